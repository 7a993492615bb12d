"""Continuous batching: which tokens of which sequences the next step computes. Pure but for the block pool's books.

A step takes one token (and, where there are some, guesses of the next ones) of every sequence that is generating, and
fills what is left of its token budget with pieces of prompts, first come, first served. A sequence is let in once the
blocks for its prompt are there. Where blocks run out, the youngest sequence gives its own up and is computed again
later; the oldest can always go on, since one sequence's context fits in the pool.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from deployments.engines.openvino.batching.paged_cache import BlockPool


class Running:
    """A sequence under way. `tokens`: its prompt and what was generated; the first `computed` of them are in the KV
    cache's blocks of `table`. `shares`: whether it may take blocks that others computed."""

    def __init__(self, tokens: list[int], shares: bool = True) -> None:
        self.tokens = tokens
        self.shares = shares
        self.computed = 0
        self.reused: int | None = None  # tokens that were in the cache already when it was let in first
        self.table: list[int] = []

    @property
    def guessable(self) -> int:
        """How many guesses of the tokens after `tokens` can be of use, at most."""
        return 0


class Guesser(Protocol):
    """Guesses what comes next, `tokens` at a time at most. Right or wrong, guesses only cost or save time."""

    tokens: int

    def guess(self, wanted: Sequence[tuple[Running, int]]) -> list[list[int]]:
        """Of each sequence up to so many tokens that may follow its own, perhaps none."""

    def forget(self, sequence: Running) -> None:
        """It ended, or waits again."""


S = TypeVar("S", bound=Running)


@dataclass(frozen=True)
class PromptPiece(Generic[S]):
    """Tokens [start, start + len(tokens)) of a sequence; the last `guessed` of them are guesses. `last`: whether its
    known tokens are all computed then."""

    sequence: S
    start: int
    tokens: list[int]
    guessed: int
    last: bool


class Scheduler(Generic[S]):
    """`budget`: tokens of one step; `max_running`: sequences in one step, at most."""

    def __init__(self, pool: BlockPool, budget: int, max_running: int, guesser: Guesser | None = None) -> None:
        self.pool = pool
        self._budget, self._max_running, self._guesser = budget, max_running, guesser
        self.waiting: deque[S] = deque()
        self.running: list[S] = []  # the oldest first

    def add(self, sequence: S) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: S) -> None:
        """One that ended, or that nobody waits for any more."""
        self._release(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def step(self) -> list[PromptPiece[S]]:
        """The next step's pieces, at most one a sequence; none where there is nothing to compute."""
        pieces: list[PromptPiece[S]] = []
        left = self._budget
        for sequence in list(self.running):
            if sequence not in self.running or left == 0:
                continue  # it gave its blocks up for an older one, or has to wait a step
            if not self._make_room(sequence, min(len(sequence.tokens), sequence.computed + left)):
                continue
            pieces.append(self._piece(sequence, left))
            left -= len(pieces[-1].tokens)
        if self._guesser and left and pieces:
            self._guess(pieces, left, self._guesser)
            left = self._budget - sum(len(piece.tokens) for piece in pieces)
        while left and self.waiting and len(self.running) < self._max_running and self._admit(self.waiting[0]):
            pieces.append(self._piece(self.running[-1], left))
            left -= len(pieces[-1].tokens)
        return pieces

    def advance(self, sequence: S, computed: int) -> None:
        """Says that the first `computed` of its tokens are in the cache now."""
        sequence.computed = computed
        self.pool.name_full(sequence.table, sequence.tokens, computed)

    def check_integrity(self) -> None:
        self.pool.check_integrity([sequence.table for sequence in (*self.running, *self.waiting)])

    def _piece(self, sequence: S, left: int) -> PromptPiece[S]:
        start = sequence.computed
        tokens = sequence.tokens[start : start + left]
        return PromptPiece(sequence, start, tokens, 0, start + len(tokens) == len(sequence.tokens))

    def _guess(self, pieces: list[PromptPiece[S]], left: int, guesser: Guesser) -> None:
        """Appends guesses to the pieces of sequences that generate, `left` in all at most, where there are blocks."""
        # A step with guesses is hardly slower while the weights' way from memory is what takes the time: few sequences.
        most = min(guesser.tokens, self._budget // (4 * len(self.running)))
        wanted: list[tuple[S, int]] = []
        for piece in pieces:
            count = min(most, left, piece.sequence.guessable) if piece.last and len(piece.tokens) == 1 else 0
            if count > 0:
                wanted.append((piece.sequence, count))
                left -= count
        found = {each: guesses for (each, _), guesses in zip(wanted, guesser.guess(wanted), strict=True)}
        for number, piece in enumerate(pieces):
            guesses = found.get(piece.sequence)
            if guesses and self.pool.grow(piece.sequence.table, piece.start + 1 + len(guesses)):
                pieces[number] = replace(piece, tokens=[*piece.tokens, *guesses], guessed=len(guesses))

    def _admit(self, sequence: S) -> bool:
        """Lets the first that waits in, where the blocks for all its tokens are there."""
        if sequence.shares:
            sequence.computed = self.pool.reuse(sequence.tokens, sequence.table)
        if not self.pool.grow(sequence.table, len(sequence.tokens)):
            self._give_up(sequence)
            return False
        if sequence.reused is None:
            sequence.reused = sequence.computed
        self.running.append(self.waiting.popleft())
        return True

    def _make_room(self, sequence: S, tokens: int) -> bool:
        """Blocks for its first `tokens` tokens, if need be those of younger ones; False where it was itself the
        youngest and gave its own up."""
        while not self.pool.grow(sequence.table, tokens):
            youngest = self.running.pop()
            self._give_up(youngest)
            self.waiting.appendleft(youngest)
            if youngest is sequence:
                return False
        return True

    def _give_up(self, sequence: S) -> None:
        self._release(sequence)
        sequence.computed = 0

    def _release(self, sequence: S) -> None:
        self.pool.release(sequence.table)
        if self._guesser:
            self._guesser.forget(sequence)
