from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.engines.sampling import Sampler, draw, log_probabilities, uniform
from deployments.records import SamplingParams

Logits = npt.NDArray[np.float32]

logits_arrays = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=50).map(lambda x: np.array(x, np.float32))
params = st.builds(
    SamplingParams,
    temperature=st.floats(0.1, 2),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.05, 1),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.3, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)


def probabilities(logits: Logits, temperature: float = 1.0) -> npt.NDArray[np.float64]:
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    return weights / weights.sum()


def nucleus(logits: Logits, p: SamplingParams) -> set[int]:
    """top_k, then top_p, told naively: add tokens by falling probability until they hold top_p."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: p.top_k or None]
    chances = probabilities(logits, p.temperature)
    chances = chances / chances[order].sum()
    kept: list[int] = []
    for token in order:
        if kept and chances[kept].sum() >= p.top_p:
            break
        kept.append(token)
    return set(kept)


@given(logits_arrays, st.sampled_from([0.0, 1e-300, 1e-6]))
def test_greedy_takes_the_lowest_id_of_equal_logits(logits: Logits, temperature: float) -> None:
    token = draw(logits, SamplingParams(temperature=temperature), 3)
    assert logits[token] == logits.max()
    assert not (logits[:token] == logits.max()).any()


@given(logits_arrays, params, st.integers(0, 4096))
def test_a_draw_stays_in_the_smallest_set_that_holds_top_p(logits: Logits, p: SamplingParams, position: int) -> None:
    chances = probabilities(logits, p.temperature)
    token = draw(logits, p, position)
    # At the very border float32 may tell.
    border = SamplingParams(temperature=p.temperature, top_k=p.top_k, top_p=min(1.0, p.top_p * (1 + 1e-5)))
    assert token in nucleus(logits, border)
    assert chances[token] >= p.min_p * chances.max() * (1 - 1e-5)
    assert chances[token] > 0


@given(logits_arrays, params, st.integers(0, 4096))
def test_a_draw_depends_on_seed_and_position_alone(logits: Logits, p: SamplingParams, position: int) -> None:
    before = logits.copy()
    first = draw(logits, p, position)
    np.random.default_rng().random(3)
    assert draw(logits.copy(), p, position) == first
    assert np.array_equal(logits, before)


@pytest.mark.parametrize("p", [SamplingParams(), SamplingParams(top_k=3), SamplingParams(top_p=0.8, temperature=0.7)])
def test_draws_are_distributed_as_the_logits_say(p: SamplingParams) -> None:
    logits = np.log(np.array([0.4, 0.05, 0.3, 0.2, 0.05], np.float32))
    allowed = sorted(nucleus(logits, p))
    expected = np.zeros(5)
    expected[allowed] = probabilities(logits, p.temperature)[allowed]
    expected /= expected.sum()
    counts = np.bincount([draw(logits, p, position) for position in range(20_000)], minlength=5)
    assert np.abs(counts / 20_000 - expected).max() < 0.015


def test_numbers_are_uniform_over_positions_and_over_seeds() -> None:
    for numbers in ([uniform(7, i) for i in range(5000)], [uniform(i, 7) for i in range(5000)]):
        assert min(numbers) >= 0
        assert max(numbers) < 1
        assert np.abs(np.histogram(numbers, 10, (0, 1))[0] - 500).max() < 120
    assert uniform(2**64 - 1, 2**31) != uniform(0, 2**31)


def test_a_taken_over_sequence_goes_on_as_it_would_have() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(20, 100)).astype(np.float32)
    p = SamplingParams(temperature=0.9, top_p=0.9, seed=5, repetition_penalty=1.2)
    whole = Sampler(p, [1, 2, 3])
    tokens = [whole.next(row) for row in rows]
    rest = Sampler(p, [1, 2, 3, *tokens[:8]])
    assert [rest.next(row) for row in rows[8:]] == tokens[8:]


def test_penalties_follow_their_definitions() -> None:
    logits = np.array([2.0, -2.0, 1.0, 0.5], np.float32)
    repetition = Sampler(SamplingParams(repetition_penalty=2.0), [0, 1])
    assert repetition._adjusted(logits).tolist() == [1.0, -4.0, 1.0, 0.5]
    counted = Sampler(SamplingParams(temperature=0, frequency_penalty=0.5, presence_penalty=0.25), [3])
    assert [counted.next(logits) for _ in range(3)] == [0, 0, 2]  # 2.0, then 1.25, then 0.75 against 1.0
    assert counted._adjusted(logits).tolist() == [0.75, -2.0, 0.25, 0.5]
    assert logits.tolist() == [2.0, -2.0, 1.0, 0.5]


def test_masked_tokens_are_never_drawn() -> None:
    logits = np.full(1000, -np.inf, np.float32)
    logits[[3, 999]] = 1.0
    for p in (SamplingParams(), SamplingParams(top_k=10), SamplingParams(top_p=0.99), SamplingParams(min_p=0.5)):
        assert {draw(logits, p, position) for position in range(50)} == {3, 999}


class OddTokens:
    """A mask that allows odd ids, and after `limit` of them only token 0."""

    def __init__(self, limit: int) -> None:
        self.left = limit
        self.accepted: list[int] = []

    def apply(self, logits: Logits) -> None:
        allowed = logits[1::2].copy() if self.left else None
        first = logits[0]
        logits[:] = -np.inf
        if allowed is not None:
            logits[1::2] = allowed
        else:
            logits[0] = first

    def accept(self, token: int) -> None:
        self.accepted.append(token)
        self.left -= 1


@given(params, st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_a_mask_is_obeyed_and_told_of_every_token(p: SamplingParams, seed: int, limit: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(limit + 1, 40)).astype(np.float32)
    mask = OddTokens(limit)
    sampler = Sampler(replace(p, logit_bias=((2, 50.0),), repetition_penalty=1.5), [4, 5], mask=mask)
    tokens = [sampler.next(row) for row in rows]
    assert all(token % 2 == 1 for token in tokens[:-1])
    assert tokens[-1] == 0
    assert mask.accepted == tokens


@given(params, st.integers(0, 2**32 - 1))
def test_no_end_token_before_min_tokens(p: SamplingParams, seed: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(5, 8)).astype(np.float32)
    rows[:, [2, 3]] += 30
    sampler = Sampler(replace(p, min_tokens=4), [1], eos_ids={2, 3})
    tokens = [sampler.next(row) for row in rows]
    assert not {2, 3} & set(tokens[:4])
    assert tokens[4] in {2, 3}


def test_a_grammar_s_end_goes_before_min_tokens() -> None:
    sampler = Sampler(SamplingParams(min_tokens=9), [1], eos_ids={0}, mask=OddTokens(1))
    assert [sampler.next(np.zeros(4, np.float32)) for _ in range(2)][1] == 0


def test_a_bias_moves_tokens_in_and_out() -> None:
    logits = np.array([3.0, 0.0, 0.0], np.float32)
    assert Sampler(SamplingParams(temperature=0, logit_bias=((1, 3.5),)), [0]).next(logits) == 1
    draws = {Sampler(SamplingParams(seed=i, logit_bias=((0, -100.0),)), [0]).next(logits) for i in range(50)}
    assert draws == {1, 2}
    assert logits.tolist() == [3.0, 0.0, 0.0]


@given(logits_arrays, st.integers(0, 60), st.data())
def test_log_probabilities_are_those_of_the_softmax(logits: Logits, count: int, data: st.DataObject) -> None:
    token = data.draw(st.integers(0, len(logits) - 1))
    logprob, top = log_probabilities(logits, token, count)
    expected = np.log(probabilities(logits))
    assert logprob == pytest.approx(expected[token], abs=1e-5)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:count]
    assert [id for id, _ in top] == order
    assert [value for _, value in top] == pytest.approx(expected[order].tolist(), abs=1e-5)
