"""The look-alikes of traces have the statistics that were published of the traces."""

from __future__ import annotations

import statistics
from collections import Counter
from itertools import pairwise
from random import Random

import pytest

from cluster.bench.figures import percentile
from tests.bench.simulation.traces import CODE, CONVERSATION, KINDS, Ask, TraceKind, renewal, shares, steps_of, trace

# Azure's traces of 2023: means, which nothing here is fitted to, of tokens in and out.
MEANS = {"conversation": (1155, 211), "code": (2048, 28)}


@pytest.fixture(scope="module")
def traces() -> dict[str, list[Ask]]:
    return {name: trace(kind, kind.rate, 3600, seed=1) for name, kind in KINDS.items()}


@pytest.mark.parametrize("name", KINDS)
def test_tokens_have_the_published_percentiles_and_nearly_the_published_means(
    traces: dict[str, list[Ask]], name: str
) -> None:
    kind, asks = KINDS[name], traces[name]
    for published, mean, found in (
        (kind.prompt, MEANS[name][0], sorted(ask.prompt_tokens for ask in asks)),
        (kind.completion, MEANS[name][1], sorted(ask.completion_tokens for ask in asks)),
    ):
        for place, value, tolerance in ((50, published.p50, 0.1), (90, published.p90, 0.1), (99, published.p99, 0.25)):
            assert percentile(found, place) == pytest.approx(value, rel=tolerance)
        assert statistics.fmean(found) == pytest.approx(mean, rel=0.25)


@pytest.mark.parametrize(("name", "tolerance"), [("conversation", 0.05), ("code", 0.25)])
def test_arrivals_have_the_published_rate_and_variation(
    traces: dict[str, list[Ask]], name: str, tolerance: float
) -> None:
    kind, times = KINDS[name], [ask.at for ask in traces[name]]
    between = [later - at for at, later in pairwise(times)]
    assert len(times) / 3600 == pytest.approx(kind.rate, rel=tolerance)
    assert statistics.pstdev(between) / statistics.fmean(between) == pytest.approx(kind.cv, rel=tolerance)


def test_code_has_seconds_of_as_many_requests_as_the_published_most(traces: dict[str, list[Ask]]) -> None:
    assert max(Counter(int(ask.at) for ask in traces["code"]).values()) in (67, 68)


def test_gamma_arrivals_of_a_greater_variation_come_in_bursts() -> None:
    for cv in (1.0, 2.0, 4.0):
        arrivals = renewal(1.0, cv, float("inf"), Random(3))
        times = [next(arrivals) for _ in range(20_000)]
        between = [later - at for at, later in pairwise(times)]
        assert statistics.pstdev(between) / statistics.fmean(between) == pytest.approx(cv, rel=0.1)


def test_turns_share_what_came_before_as_published(traces: dict[str, list[Ask]]) -> None:
    """37 % of the blocks of Mooncake's trace, 54 to 62 % of others at best."""
    asks = traces["conversation"]
    shared = sum(ask.shared for ask in asks) / sum(ask.prompt_tokens for ask in asks)
    assert 0.37 <= shared <= 0.62
    assert len(asks) / len({ask.conversation for ask in asks}) == pytest.approx(CONVERSATION.turns, rel=0.1)
    assert not any(ask.shared for ask in traces["code"])


def test_a_conversation_s_prompts_grow_and_its_turns_lie_apart(traces: dict[str, list[Ask]]) -> None:
    turns: dict[int, list[Ask]] = {}
    for ask in traces["conversation"]:
        turns.setdefault(ask.conversation, []).append(ask)
    for asks in turns.values():
        assert asks[0].shared == 0
        for before, ask in pairwise(asks):
            assert ask.prompt_tokens >= before.prompt_tokens
            assert ask.shared == min(ask.prompt_tokens, before.prompt_tokens + before.completion_tokens)
            assert ask.at - before.at >= CONVERSATION.think_s
            assert ask.client == before.client


def test_a_greater_load_has_more_clients_a_few_of_them_heavy() -> None:
    asks = trace(CODE, 10 * CODE.rate, 600, seed=2)
    by_client = Counter(ask.client for ask in asks)
    assert len(by_client) > 5
    assert by_client.most_common(1)[0][1] > 2 * len(asks) / 10
    assert sum(shares(10)) == pytest.approx(1)
    assert shares(10)[0] == pytest.approx(10 * shares(10)[9])


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_the_same_seed_draws_the_same_requests_in_order(kind: TraceKind) -> None:
    asks = trace(kind, 2 * kind.rate, 60, seed=5)
    assert asks == trace(kind, 2 * kind.rate, 60, seed=5)
    assert [ask.at for ask in asks] == sorted(ask.at for ask in asks)
    assert all(0 <= ask.at < 75 for ask in asks)


def test_loads_one_after_the_other_share_no_conversation() -> None:
    asks = steps_of(CONVERSATION, [(5.0, 60.0), (20.0, 60.0)], seed=1)
    first, second = ([ask for ask in asks if (ask.at >= 60) == late] for late in (False, True))
    assert len(second) > 2 * len(first)
    assert not {ask.conversation for ask in first} & {ask.conversation for ask in second}
