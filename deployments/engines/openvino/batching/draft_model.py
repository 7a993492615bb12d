"""Guessing the next tokens with a smaller model of the same vocabulary, whose keys and values are cached as well.

Speculative decoding (Leviathan et al. 2023); the guesses are the draft model's greedy ones, of all sequences together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from deployments.engines.openvino.batching.paged_cache import BlockPool
from deployments.engines.openvino.batching.scheduler import Running
from deployments.engines.openvino.paged_model import PagedModel, Work


@dataclass
class _Draft:
    """Of a sequence. The keys and values of `tokens` are in the draft model's blocks of `table`; `pending` are to be
    computed next. The first `known` tokens are the sequence's own, and `guesses` follow them, `limit` at most."""

    tokens: list[int] = field(default_factory=list)
    table: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    known: int = 0
    guesses: list[int] = field(default_factory=list)
    limit: int = 0

    def catch_up(self, tokens: Sequence[int], limit: int, most: int) -> None:
        """Forgets guesses that were wrong. `most`: tokens to compute of what it has not; the last of all in any case,
        since what follows it is wanted."""
        same = min(len(self.tokens), len(tokens) - 1)
        while self.tokens[:same] != tokens[:same]:
            same -= 1
        del self.tokens[same:]
        self.pending = list(tokens[same : same + most])
        self.known, self.guesses, self.limit = len(tokens), [], limit

    def computed(self, following: int) -> None:
        """`following`: the token that most likely comes after those that were pending."""
        self.tokens += self.pending
        self.pending = []
        if len(self.tokens) == self.known + len(self.guesses):
            self.guesses.append(following)
            if len(self.guesses) < self.limit:
                self.pending = [following]


class DraftModel:
    """A Guesser. `tokens`: guessed at a time, at most; `step_tokens`: computed together, at most, so that a sequence
    with a long prompt gets its first guesses some steps later; `vocabulary`: of the model that is guessed for."""

    def __init__(self, model: PagedModel, pool: BlockPool, tokens: int, step_tokens: int, vocabulary: int) -> None:
        self.tokens = tokens
        self._model, self._pool = model, pool
        self._step_tokens, self._vocabulary = step_tokens, vocabulary
        self._drafts: dict[Running, _Draft] = {}

    def guess(self, wanted: Sequence[tuple[Running, int]]) -> list[list[int]]:
        """See Guesser. Raises EngineError where the model fails."""
        drafts, left = [], self._step_tokens
        for sequence, limit in wanted:
            drafts.append(draft := self._draft(sequence))
            draft.catch_up(sequence.tokens, limit, left)
            left -= len(draft.pending)
        # A sequence for which blocks are lacking just gets fewer guesses.
        while going := [draft for draft in drafts if draft.pending and self._has_room(draft)]:
            for draft, following in zip(going, self._step(going), strict=True):
                own = not draft.guesses  # what was computed are the sequence's own tokens: full blocks can be shared
                draft.computed(following)
                if own:
                    self._pool.name_full(draft.table, draft.tokens, len(draft.tokens))
        return [draft.guesses for draft in drafts]

    def forget(self, sequence: Running) -> None:
        if draft := self._drafts.pop(sequence, None):
            self._pool.release(draft.table)

    def check_integrity(self) -> None:
        """Raises EngineError where the books do not add up."""
        self._pool.check_integrity([draft.table for draft in self._drafts.values()])

    def _draft(self, sequence: Running) -> _Draft:
        draft = self._drafts.get(sequence)
        if draft is None:
            draft = self._drafts[sequence] = _Draft()
            draft.tokens = sequence.tokens[: self._pool.reuse(sequence.tokens, draft.table)]
        return draft

    def _has_room(self, draft: _Draft) -> bool:
        return self._pool.grow(draft.table, len(draft.tokens) + len(draft.pending))

    def _step(self, drafts: Sequence[_Draft]) -> list[int]:
        """Computes what is pending; the token that most likely follows each."""
        works = []
        for draft in drafts:
            # Vocabularies may be padded differently: a token that the draft model has not is none that a text has.
            tokens = [min(token, self._model.vocab_size - 1) for token in draft.pending]
            works.append(Work(tokens, len(draft.tokens), draft.table, [len(tokens) - 1]))
        logits, _ = self._model.step(works)
        return [int(token) for token in logits[:, : self._vocabulary].argmax(axis=1)]
