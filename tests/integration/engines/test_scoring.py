"""Log probabilities, scores and embeddings of the bigdl engine on the demo artifacts, with the real libraries."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cluster.artifacts.ggml import BLOCK_WEIGHTS
from cluster.artifacts.manifest import Manifest
from cluster.errors import EngineError, InvalidRequestError
from cluster.families import FAMILIES, FAMILY_NAMES, FamilyName
from cluster.machine.isa import choose_isa
from deployments.engines.agreement import relative_rms
from deployments.engines.base import Logits, Token, TokenRequest
from deployments.engines.bigdl import engine as bigdl_engine
from deployments.engines.bigdl.engine import BigdlEngine
from deployments.engines.bigdl.model import BLOCK, PrefillCancelledError, load_model
from deployments.engines.ggml_blocks import BLOCKS
from deployments.engines.sampling import log_probabilities
from deployments.generation.text import Tokenizer
from deployments.records import SamplingParams

Artifact = Callable[[FamilyName], Path]
CONTEXT = 160
GREEDY = SamplingParams(temperature=0)
# Float noise between tokens evaluated one by one and as a batch, relative to the logits' spread.
NOISE = 0.15
# What the demos were made to say, so that their scores differ much from those of random tokens.
TEXT = "Q: What is CPU? A:"

per_family = pytest.mark.parametrize("family", FAMILY_NAMES)


def ids(seed: int, count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, 512, count)]


async def collect(engine: BigdlEngine, request: TokenRequest) -> list[Token]:
    return [token async for batch in engine.generate(request) for token in batch]


def logprobs_of(tokens: list[Token]) -> npt.NDArray[np.float64]:
    return np.array([token.logprob for token in tokens], np.float64)


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def engine(request: pytest.FixtureRequest, demo_artifact: Artifact) -> Iterator[BigdlEngine]:
    engine = BigdlEngine(demo_artifact(request.param), threads=1, context=CONTEXT)
    yield engine
    engine.check_integrity()
    engine.close()


async def test_a_greedy_token_is_the_most_likely_one(engine: BigdlEngine) -> None:
    prompt = ids(1, 40)
    plain = await collect(engine, TokenRequest(prompt, 12, GREEDY))
    tokens = await collect(engine, TokenRequest(prompt, 12, GREEDY, logprobs=5))
    assert [token.id for token in tokens] == [token.id for token in plain]
    assert all(token.logprob is None and token.top == () for token in plain)
    for token in tokens:
        assert token.top[0] == (token.id, token.logprob)
        values = [value for _, value in token.top]
        assert len({id for id, _ in token.top}) == 5
        assert values == sorted(values, reverse=True)
        assert -20 < values[0] <= 0
        assert sum(map(np.exp, values)) <= 1 + 1e-9


async def test_log_probabilities_are_the_models_own_whatever_the_sampling(engine: BigdlEngine) -> None:
    prompt = ids(2, 20)
    (greedy,) = await collect(engine, TokenRequest(prompt, 1, GREEDY, logprobs=512))
    most_likely = greedy.id
    away = SamplingParams(temperature=0.5, logit_bias=((most_likely, -100.0),), repetition_penalty=1.3, seed=3)
    (other,) = await collect(engine, TokenRequest(prompt, 1, away, logprobs=512))
    assert other.id != most_likely
    assert other.top == greedy.top
    assert other.logprob == dict(greedy.top)[other.id]
    assert sum(np.exp(value) for _, value in greedy.top) == pytest.approx(1, abs=1e-6)


async def test_a_score_agrees_with_what_generating_said(engine: BigdlEngine) -> None:
    prompt = ids(3, 45)
    tokens = await collect(engine, TokenRequest(prompt, 60, SamplingParams(seed=4), logprobs=3))
    whole = [*prompt, *(token.id for token in tokens)]
    scored = await engine.score(whole, 3)
    assert [token.id for token in scored] == whole
    assert (scored[0].logprob, scored[0].top) == (None, ())
    found, expected = logprobs_of(scored[len(prompt) :]), logprobs_of(tokens)
    assert np.sqrt(np.mean((found - expected) ** 2)) < NOISE * expected.std()
    assert all(len(token.top) == 3 for token in scored[1:])
    assert all(token.finish_reason is None for token in scored)


async def test_a_score_is_a_function_of_the_prompt_and_changes_nothing_after_it(engine: BigdlEngine) -> None:
    request = TokenRequest(ids(5, 3 * BLOCK), 12, SamplingParams(seed=6))
    expected = await collect(engine, request)
    first = await engine.score(request.prompt, 2)
    assert await collect(engine, request) == expected
    await engine.score(ids(6, 50), 0)
    assert await engine.score(request.prompt, 2) == first
    await engine.score(request.prompt[:40], 0)
    assert await collect(engine, request) == expected
    engine.check_integrity()


@per_family
def test_scores_are_those_of_decoding_token_by_token(demo_artifact: Artifact, family: FamilyName) -> None:
    model = load_model(demo_artifact(family), 1, CONTEXT, choose_isa())
    tokens = ids(7, 2 * BLOCK + 9)
    single = model.all_logits(tokens)
    rows = [row.copy() for row in model.logits_before(tokens)]
    assert len(rows) == len(tokens) - 1
    for row, expected in zip(rows, single, strict=False):
        assert relative_rms(row, expected) < NOISE
    model.close()


@per_family
async def test_a_demo_foretells_its_own_text_better_than_noise(demo_artifact: Artifact, family: FamilyName) -> None:
    engine = BigdlEngine(demo_artifact(family), 1, CONTEXT)
    prompt = Tokenizer(demo_artifact(family)).encode(TEXT)
    likely, noise = await engine.score(prompt, 0), await engine.score(ids(8, len(prompt)), 0)
    perplexity, of_noise = (np.exp(-logprobs_of(scored[1:]).mean()) for scored in (likely, noise))
    assert 1 <= perplexity < of_noise
    assert np.isfinite(of_noise)
    engine.close()


@per_family
async def test_scores_are_counted_and_one_token_needs_no_evaluation(
    demo_artifact: Artifact, family: FamilyName
) -> None:
    engine = BigdlEngine(demo_artifact(family), 1, CONTEXT)
    assert await engine.score([9], 5) == [Token(9)]
    await engine.score(ids(9, CONTEXT), 0)  # the whole context
    await engine.embed(ids(9, CONTEXT))
    info = engine.info()
    assert (info["requests"], info["scored_tokens"], info["prompt_tokens"]) == (3, 1 + CONTEXT, CONTEXT)
    engine.close()


async def test_prompts_that_the_library_must_not_see_are_refused(engine: BigdlEngine) -> None:
    for prompt in ([], [1] * (CONTEXT + 1), [5, 512], [-1]):
        with pytest.raises(InvalidRequestError) as caught:
            await engine.score(prompt, 0)
        assert caught.value.field == "prompt"
        with pytest.raises(InvalidRequestError):
            await engine.embed(prompt)


@per_family
def test_a_score_is_cancelled_between_tokens(demo_artifact: Artifact, family: FamilyName) -> None:
    model = load_model(demo_artifact(family), 1, CONTEXT, choose_isa())
    prompt = ids(10, 100)
    expected = model.prefill(prompt)[0].copy()
    answers = iter([False] * 40 + [True])
    seen: list[Logits] = []
    with pytest.raises(PrefillCancelledError):
        seen.extend(model.logits_before(prompt, lambda: next(answers)))
    assert len(seen) == 40
    assert np.array_equal(model.prefill(prompt)[0], expected)
    model.close()


@pytest.fixture
def slow_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A score of the whole context takes more than a second on any machine."""

    def slow(*arguments: Any) -> Any:
        time.sleep(0.01)  # at each token
        return log_probabilities(*arguments)

    monkeypatch.setattr(bigdl_engine, "log_probabilities", slow)


@pytest.mark.usefixtures("slow_scores")
async def test_an_abandoned_score_stops_and_leaves_the_engine_sound(engine: BigdlEngine) -> None:
    before = engine.info()
    prompt = ids(11, CONTEXT)
    running = asyncio.create_task(engine.score(prompt, 0))
    waiting = asyncio.create_task(engine.score(prompt, 0))
    while engine.info()["requests"] == before["requests"]:
        await asyncio.sleep(0)
    running.cancel()
    waiting.cancel()
    await asyncio.gather(running, waiting, return_exceptions=True)
    assert running.cancelled()
    assert waiting.cancelled()
    engine.check_integrity()  # waits until the worker is free
    after = engine.info()
    assert after["requests"] == int(before["requests"]) + 1  # the one that waited never started
    assert after["cancelled"] == int(before["cancelled"]) + 1
    assert after["scored_tokens"] == before["scored_tokens"]


@pytest.mark.usefixtures("slow_scores")
@pytest.mark.parametrize("call", ["score", "embed"])
async def test_closing_the_engine_ends_what_runs_and_what_waits(demo_artifact: Artifact, call: str) -> None:
    engine = BigdlEngine(demo_artifact("llama"), 1, CONTEXT)
    prompt = ids(12, CONTEXT)
    tasks = [asyncio.create_task(engine.score(prompt, 0))]
    tasks += [asyncio.create_task(engine.score(prompt, 0) if call == "score" else engine.embed(prompt))]  # type: ignore[list-item]
    while engine.info()["requests"] == 0:
        await asyncio.sleep(0)
    await asyncio.to_thread(engine.close)
    for task in tasks:
        with pytest.raises(EngineError, match="closed"):
            await asyncio.wait_for(task, 30)


def output_matrix(folder: Path) -> Logits:
    """The artifact's output layer, [vocab_size, width], from its Q4_0 blocks."""
    manifest = Manifest.read(folder)
    tensor = next(tensor for tensor in manifest.tensors if tensor.name == FAMILIES[manifest.family].container.output)
    blocks = np.fromfile(
        folder / manifest.binary, BLOCKS["q4_0"], tensor.bytes // BLOCKS["q4_0"].itemsize, offset=tensor.offset
    )
    weights = np.concatenate([blocks["weights"] & 15, blocks["weights"] >> 4], axis=1).astype(np.float32) - 8
    assert weights.shape[1] == BLOCK_WEIGHTS
    result: Logits = (weights * blocks["scale"].astype(np.float32)[:, None]).reshape(tensor.shape)
    return result


@per_family
def test_an_embedding_is_what_the_output_layer_makes_the_logits_of(demo_artifact: Artifact, family: FamilyName) -> None:
    """Hence the last token's hidden state after the final norm."""
    model = load_model(demo_artifact(family), 1, CONTEXT, choose_isa())
    matrix = output_matrix(demo_artifact(family))
    vectors = []
    for count in (1, BLOCK, 2 * BLOCK + 5):
        prompt = ids(13, count)
        vector = model.embed(prompt)[0].copy()
        logits = model.prefill(prompt)[0]
        assert vector.shape == (matrix.shape[1],)
        assert relative_rms(matrix @ vector, logits) < 0.02  # the library rounds the vector to 8 bits
        vectors.append(vector)
    assert relative_rms(vectors[1], vectors[2]) > 2 * NOISE
    model.close()


async def test_an_embedding_is_a_function_of_the_prompt_alone(engine: BigdlEngine) -> None:
    prompt = ids(14, 2 * BLOCK + 7)
    first = await engine.embed(prompt)
    assert np.isfinite(first).all()
    assert await engine.embed(prompt) == first
    tokens = await collect(engine, TokenRequest(prompt[:-9], 3, GREEDY))
    continued = [*prompt[:-9], *(token.id for token in tokens)]
    after_decoding = await engine.embed(continued)  # not of what was decoded token by token
    await engine.score(prompt, 0)
    assert await engine.embed(prompt) == first
    await engine.embed(ids(15, 3))
    assert await engine.embed(continued) == after_decoding
    await engine.score(continued, 0)
    assert await engine.embed(continued) == after_decoding


async def test_generating_after_an_embedding_gives_the_same_tokens(engine: BigdlEngine) -> None:
    request = TokenRequest(ids(16, 2 * BLOCK), 12, SamplingParams(seed=7), logprobs=1)
    expected = await collect(engine, request)
    await engine.embed(ids(17, 9))
    assert await collect(engine, request) == expected
    await engine.embed(request.prompt)
    assert await collect(engine, request) == expected
    engine.check_integrity()


class OnlyMultiplesOfSeven:
    """A mask, as a grammar's."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def apply(self, logits: Logits) -> None:
        logits[np.arange(len(logits)) % 7 != 0] = -np.inf

    def accept(self, token: int) -> None:
        self.accepted.append(token)


async def test_a_mask_is_obeyed_and_log_probabilities_are_those_without_it(engine: BigdlEngine) -> None:
    mask = OnlyMultiplesOfSeven()
    prompt = ids(18, 20)
    tokens = await collect(engine, TokenRequest(prompt, 10, SamplingParams(seed=8), logprobs=0, mask=mask))
    assert mask.accepted == [token.id for token in tokens]
    assert all(token.id % 7 == 0 for token in tokens)
    scored = await engine.score([*prompt, *mask.accepted], 0)
    noise = logprobs_of(scored[len(prompt) :]) - logprobs_of(tokens)
    assert np.abs(noise).mean() < 1
