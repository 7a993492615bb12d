"""Routing by cost, without Ray: which replica is chosen, and what is learned from what comes back."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.records import GenerationChunk, GenerationRequest, Prompt
from deployments.routing import prefix as prefix_module
from deployments.routing.prefix import (
    BLOCK_BYTES,
    BLOCK_IDS,
    PREFILL_S,
    ReplicaCosts,
    Routed,
    prefix_of,
)

IDLE = {"a": 0, "b": 0, "c": 0}


def request(prompt: Prompt) -> GenerationRequest:
    return GenerationRequest(request_id="r", prompt=prompt, max_tokens=8)


def blocks_of(prompt: Prompt) -> tuple[int, ...]:
    return prefix_of(request(prompt)).blocks


def text(number: int, blocks: int) -> str:
    """Of so many whole blocks, that of each number with another beginning."""
    return f"{number:08}".ljust(blocks * BLOCK_BYTES, "x")


class Costs(ReplicaCosts):
    """With replicas a, b and c, and a clock that a test sets."""

    def __init__(self, cache_tokens: int = 100_000, single: bool = False) -> None:
        self.now = 0.0
        super().__init__(cache_tokens, single, lambda: self.now)
        self.keep(IDLE)

    def send(
        self, prompt: str, session: str | None = None, tokens: int | None = None, others: dict[str, int] = IDLE
    ) -> Routed:
        """A completion of a prompt with a token for each four characters, and 5 tokens to generate."""
        prefix = prefix_of(request(prompt))
        routed = Routed(prefix, session, len(prompt) // 4 if tokens is None else tokens, 5)
        self.choose(routed, others)
        self.check_integrity()
        return routed

    def first_token(self, routed: Routed, cached: int) -> None:
        self.came(routed, GenerationChunk("x", (1,), None, routed.prompt_tokens, 1, cached_tokens=cached))
        self.check_integrity()

    def finish(self, routed: Routed) -> str:
        """It is computed as fast as was expected. Where it was."""
        home = routed.replica or ""
        self.now += routed.uncached * PREFILL_S
        self.first_token(routed, routed.prompt_tokens - routed.uncached)
        self.end(routed)
        self.check_integrity()
        return home


# --- which replica


def test_the_same_prefix_goes_to_the_same_replica_while_it_is_idle() -> None:
    costs = Costs()
    homes = {}
    for number in range(12):
        routed = costs.send(text(number, 8))
        homes[number] = routed.replica
        costs.finish(routed)
    assert len(set(homes.values())) == 3, "cold prompts are spread"
    for number in range(12):
        routed = costs.send(text(number, 8) + "and more, " * 20)
        assert routed.replica == homes[number]
        assert routed.uncached < routed.prompt_tokens / 2
        costs.finish(routed)


def test_a_new_router_chooses_as_another_one_does_for_the_same_prompts() -> None:
    one, other = Costs(), Costs()
    for number in range(20):
        routed = one.send(text(number, 8), session=f"s{number % 3}")
        assert other.send(text(number, 8), session=f"s{number % 3}").replica == routed.replica
        one, other = Costs(), Costs()


def test_a_replica_with_much_to_compute_loses_even_what_it_has_cached() -> None:
    costs = Costs()
    home = costs.finish(costs.send(text(1, 8)))
    alone = {home: 0}
    for number in range(2, 10):
        costs.send(text(number, 8), others=alone)
    assert costs.send(text(1, 8)).replica != home


def test_requests_of_other_routers_count() -> None:
    costs = Costs()
    home = costs.finish(costs.send(text(1, 8)))
    assert costs.send(text(1, 8), others=IDLE | {home: 4}).replica != home


def test_those_that_come_at_once_are_spread_before_the_first_one_is_computed() -> None:
    costs = Costs()
    assert Counter(costs.send(text(n, 8)).replica for n in range(12)) == dict.fromkeys(IDLE, 4)


def test_a_slower_replica_whose_work_stays_longer_gets_less() -> None:
    costs, sent = Costs(), Counter()
    running: list[tuple[float, Routed]] = []
    for number in range(60):
        routed = costs.send(text(number, 16))
        sent[routed.replica] += 1
        running.append((costs.now + (1.0 if routed.replica == "a" else 4.0), routed))
        costs.now += 0.5
        for ends, each in running:
            if ends <= costs.now and each.replica is not None:
                costs.end(each)
    assert sent["a"] > 1.5 * max(sent["b"], sent["c"])
    assert min(sent.values()) > 5


def test_what_a_prompt_costs_is_measured() -> None:
    for seconds in (0.01, 10.0):
        costs = Costs()
        for number in range(4):
            routed = costs.send(text(number, 8))
            costs.now += seconds
            costs.first_token(routed, cached=0)
            costs.end(routed)
        assert costs._work_s(256, 0) == pytest.approx(seconds, rel=0.5)


# --- sessions


def test_a_session_stays_where_it_was_without_a_known_prefix() -> None:
    costs = Costs()
    homes = {}
    for turn in range(4):
        for session in ("x", "y", "z", "w"):
            routed = costs.send(f"short {turn}", session=session)
            assert routed.replica == homes.setdefault(session, routed.replica)
            costs.finish(routed)


def test_a_session_leaves_a_replica_that_is_busier_by_seconds_and_by_a_factor() -> None:
    costs = Costs()
    home = costs.finish(costs.send("short", session="s"))
    elsewhere = [id for id in IDLE if id != home]
    # Busier by little: half a second is nothing against what a move costs.
    light = costs.send("short", tokens=20, others={home: 0})
    routed = costs.send("short", session="s")
    assert routed.replica == home
    costs.finish(routed)
    costs.end(light)
    # All busy: busier by seconds, but not by much.
    for id, blocks in {home: 22, elsewhere[0]: 20, elsewhere[1]: 20}.items():
        costs.send(text(1, blocks), others={id: 0})
    routed = costs.send("short", session="s")
    assert routed.replica == home
    costs.end(routed)
    # By both.
    costs.send(text(2, 20), others={home: 0})
    moved = costs.finish(costs.send("short", session="s"))
    assert moved in elsewhere
    assert costs.send("short", session="s").replica == moved, "its cache is there now"


def test_a_session_whose_replica_is_full_goes_elsewhere() -> None:
    costs = Costs()
    home = costs.finish(costs.send("short", session="s"))
    assert costs.send("short", session="s", others={id: 0 for id in IDLE if id != home}).replica != home


def test_sessions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_module, "MAX_SESSIONS", 5)
    costs = Costs()
    for number in range(20):
        costs.finish(costs.send("short", session=f"s{number}"))
    assert len(costs._sessions) == 5


# --- what comes back


def test_the_first_chunk_of_a_stream_shows_what_a_replica_has_dropped() -> None:
    costs = Costs()
    only = {"a": 0}
    for number in range(4):
        costs.finish(costs.send(text(number, 8), others=only))
    again = costs.send(text(1, 8), others=only)
    assert again.uncached == 1, "as far as is known"
    costs.first_token(again, cached=0)
    costs.end(again)
    known = [costs._replicas["a"].blocks.known(blocks_of(text(number, 8))) for number in range(4)]
    assert known == [0, 8, 8, 8], "what was used before is gone, too; this one is computed now"


def test_a_first_chunk_that_misses_some_blocks_shows_nothing() -> None:
    costs = Costs()
    only = {"a": 0}
    for number in range(2):
        costs.finish(costs.send(text(number, 8), others=only))
    again = costs.send(text(1, 8), others=only)
    costs.first_token(again, cached=again.prompt_tokens - 3 * BLOCK_IDS)
    assert costs._replicas["a"].blocks.known(blocks_of(text(0, 8))) == 8


def test_two_that_are_computed_together_show_nothing_to_be_dropped() -> None:
    costs = Costs()
    only = {"a": 0}
    costs.finish(costs.send(text(0, 8), others=only))
    both = [costs.send(text(1, 8), others=only) for _ in range(2)]
    for routed in both:
        costs.first_token(routed, cached=0)
    assert costs._replicas["a"].blocks.known(blocks_of(text(0, 8))) == 8


def test_what_failed_before_its_first_token_is_not_in_the_cache() -> None:
    costs = Costs()
    routed = costs.send(text(1, 8), others={"a": 0})
    costs.end(routed)
    costs.end(routed)
    costs.check_integrity()
    assert costs._replicas["a"].blocks.known(blocks_of(text(1, 8))) == 0
    assert costs.completions("a") == 0


def test_an_engine_with_one_sequence_has_the_last_prompt_alone() -> None:
    costs = Costs(single=True)
    only = {"a": 0}
    costs.finish(costs.send(text(1, 8), others=only))
    costs.finish(costs.send(text(2, 8), others=only))
    assert costs.send(text(2, 8), others=only).uncached == 1
    assert costs.send(text(1, 8), others=only).uncached == 256


@pytest.mark.parametrize(("single", "waits"), [(True, False), (False, True)])
def test_decoding_outweighs_a_cached_prompt_where_it_is_slow_and_nothing_else_runs_meanwhile(
    single: bool, waits: bool
) -> None:
    costs = Costs(single=single)
    only = {"a": 0}
    for turn in range(3):
        slow = costs.send(text(1, 8), others=only)
        costs.first_token(slow, cached=0 if turn == 0 else 224)
        costs.now += 10
        costs.came(slow, GenerationChunk("x", (1,), None, 256, 5, cached_tokens=0))
        costs.end(slow)
    costs.send(text(1, 8), others=only)
    assert (costs.send(text(1, 8)).replica == "a") == waits


def test_a_request_that_a_full_replica_rejected_is_chosen_for_anew_and_counts_once() -> None:
    costs = Costs()
    routed = costs.send(text(1, 8))
    for _ in range(3):
        costs.choose(routed, IDLE)
        costs.check_integrity()
    assert sum(costs.completions(id) for id in IDLE) == 1


def test_a_replica_that_left_is_forgotten_and_what_was_in_it_may_end() -> None:
    costs = Costs()
    routed = costs.send(text(1, 8), session="s")
    home = routed.replica or ""
    costs.keep(id for id in IDLE if id != home)
    left = {id: 0 for id in IDLE if id != home}
    again = costs.send(text(1, 8), session="s", others=left)
    assert (again.replica != home, again.uncached) == (True, again.prompt_tokens)
    costs.first_token(routed, cached=0)
    costs.end(routed)
    costs.keep(IDLE)
    costs.check_integrity()
    assert costs.completions(home) == 0


@given(
    st.lists(st.tuples(st.sampled_from(["send", "first", "end", "keep"]), st.integers(0, 9), st.integers(0, 600))),
    st.booleans(),
)
def test_the_books_add_up_whatever_comes(steps: list[tuple[str, int, int]], single: bool) -> None:
    costs = Costs(cache_tokens=20 * BLOCK_IDS, single=single)
    sent: list[Routed] = []
    for step, number, cached in steps:
        costs.now += 0.1
        if step == "send":
            sent.append(costs.send(text(number, number), session=f"s{number}" if number % 2 else None))
        elif step == "keep":
            costs.keep("abc"[: number % 3])
            costs.keep(IDLE)
        elif sent:
            routed = sent[number % len(sent)]
            if step == "first":
                costs.first_token(routed, min(cached, routed.prompt_tokens))
            else:
                costs.end(routed)
        costs.check_integrity()
    for routed in sent:
        costs.end(routed)
    costs.check_integrity()
    assert not any(costs.completions(id) for id in IDLE)
