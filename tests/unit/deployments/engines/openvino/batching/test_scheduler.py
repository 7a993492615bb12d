from __future__ import annotations

from collections.abc import Sequence

from deployments.engines.openvino.batching.paged_cache import BLOCK_TOKENS, BlockPool
from deployments.engines.openvino.batching.scheduler import PromptPiece, Running, Scheduler

B = BLOCK_TOKENS


class Guessable(Running):
    guessable = 100


class Fixed:
    """A Guesser that says the same of every sequence, and notes what is asked of it."""

    def __init__(self, *guesses: int) -> None:
        self.tokens = len(guesses)
        self._guesses = list(guesses)
        self.limits: list[list[int]] = []
        self.forgotten: list[Running] = []

    def guess(self, wanted: Sequence[tuple[Running, int]]) -> list[list[int]]:
        self.limits.append([limit for _, limit in wanted])
        return [self._guesses[:limit] for _, limit in wanted]

    def forget(self, sequence: Running) -> None:
        self.forgotten.append(sequence)


def scheduler(
    blocks: int = 16, budget: int = 64, max_running: int = 8, guesser: Fixed | None = None
) -> Scheduler[Running]:
    return Scheduler(BlockPool(blocks), budget, max_running, guesser)


def run(scheduler: Scheduler[Running]) -> list[PromptPiece[Running]]:
    """One step in which every sequence that was computed whole generates the token 7."""
    pieces = scheduler.step()
    for piece in pieces:
        sequence = piece.sequence
        scheduler.advance(sequence, piece.start + len(piece.tokens) - piece.guessed)
        if piece.last:
            sequence.tokens.append(7)
    scheduler.check_integrity()
    return pieces


def shapes(pieces: list[PromptPiece[Running]]) -> list[tuple[int, int, bool]]:
    return [(piece.start, len(piece.tokens), piece.last) for piece in pieces]


def test_prompts_come_first_come_first_served_and_then_one_token_a_step() -> None:
    s = scheduler()
    s.add(Running([1] * 10))
    s.add(Running([2] * 20))
    assert shapes(run(s)) == [(0, 10, True), (0, 20, True)]
    assert shapes(run(s)) == [(10, 1, True), (20, 1, True)]


def test_a_prompt_beyond_the_budget_is_cut_and_the_others_go_on_meanwhile() -> None:
    s = scheduler(budget=16)
    s.add(Running([1] * 4))
    s.add(Running(list(range(40))))
    assert shapes(run(s)) == [(0, 4, True), (0, 12, False)]
    assert shapes(run(s)) == [(4, 1, True), (12, 15, False)]
    assert shapes(run(s)) == [(5, 1, True), (27, 13, True)]


def test_no_more_sequences_run_than_allowed() -> None:
    s = scheduler(max_running=2)
    for _ in range(3):
        s.add(Running([1, 2]))
    assert len(run(s)) == 2
    s.remove(s.running[0])
    assert shapes(run(s)) == [(2, 1, True), (0, 2, True)]


def test_a_prompt_waits_until_its_blocks_are_free() -> None:
    s = scheduler(blocks=2)
    s.add(Running([1] * B))
    s.add(Running([2] * B))
    run(s)
    first = s.running[0]
    assert len(s.running) == 2
    s.remove(first)
    s.add(Running([3] * (B + 1)))  # two blocks; one is free
    assert [piece.sequence.tokens[0] for piece in run(s)] == [2]
    assert len(s.waiting) == 1


def test_the_youngest_gives_its_blocks_up_and_is_computed_again() -> None:
    s = scheduler(blocks=2)
    old, young = Running([1] * B), Running([2] * 5)
    s.add(old)
    s.add(young)
    run(s)
    assert [piece.sequence for piece in run(s)] == [old]  # its next token needs the second block
    assert (list(s.waiting), young.computed, young.table) == ([young], 0, [])
    assert young.tokens == [2] * 5 + [7]  # what it had generated is kept
    s.remove(old)
    assert shapes(run(s)) == [(0, 6, True)]


def test_one_that_shares_starts_behind_what_was_computed_and_one_that_does_not_at_the_start() -> None:
    s = scheduler()
    s.add(Running([1] * (2 * B)))
    run(s)
    s.add(Running([1] * (2 * B) + [5]))
    s.add(Running([1] * 3, shares=False))
    assert shapes(run(s))[1:] == [(2 * B, 1, True), (0, 3, True)]
    assert [sequence.reused for sequence in s.running] == [0, 2 * B, 0]


def test_guesses_come_along_with_a_single_token_and_as_far_as_blocks_are_there() -> None:
    s = scheduler(budget=64, blocks=1, guesser=Fixed(8, 9, 8))
    s.add(Guessable([1] * (B - 4)))
    run(s)
    (piece,) = run(s)
    assert (piece.tokens, piece.guessed) == ([7, 8, 9, 8], 3)
    (piece,) = run(s)  # one right of it, then the block would be full
    assert piece.guessed == 0


def test_more_sequences_get_fewer_guesses_and_what_cannot_use_them_none() -> None:
    guesser = Fixed(8, 8, 8, 8, 8, 8)
    s = scheduler(budget=16, guesser=guesser)
    s.add(Guessable([1]))
    s.add(Running([2]))
    s.add(Guessable([3]))
    run(s)
    assert [piece.guessed for piece in run(s)] == [1, 0, 1]  # 16 // (4 * 3)
    s.remove(s.running[0])
    assert [piece.guessed for piece in run(s)] == [0, 2]  # 16 // (4 * 2)


def test_a_prompt_under_way_comes_before_guesses() -> None:
    guesser = Fixed(8)
    s = scheduler(budget=8, guesser=guesser)
    s.add(Guessable([1]))
    s.add(Guessable([2] * 40))
    run(s)
    assert [(len(piece.tokens), piece.guessed) for piece in run(s)] == [(1, 0), (7, 0)]
    assert guesser.limits == []


def test_the_guesser_forgets_what_ends_and_what_gives_its_blocks_up() -> None:
    guesser = Fixed(8)
    s = scheduler(blocks=2, guesser=guesser)
    old, young = Guessable([1] * B), Guessable([2] * 5)
    s.add(old)
    s.add(young)
    run(s)
    run(s)  # the older one's next token needs a block
    assert set(guesser.forgotten) == {young}
    s.remove(old)
    assert guesser.forgotten[-1] is old


def test_removing_a_waiting_and_a_running_one_frees_everything() -> None:
    s = scheduler(max_running=1)
    one, two = Running([1] * 40), Running([2] * 40)
    s.add(one)
    s.add(two)
    run(s)
    s.remove(one)
    s.remove(two)
    assert s.pool.free == s.pool.size
    assert run(s) == []
