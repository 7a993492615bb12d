"""What a step's results mean for each kind of request: generate, score, embed."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deployments.engines.base import Logits, Token, TokenRequest
from deployments.engines.handover import Handover
from deployments.engines.openvino.batching.scheduler import PromptPiece, Running
from deployments.engines.sampling import Sampler, log_probabilities
from deployments.records import FinishReason

Hidden = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Received:
    """From a step: `computed` tokens of the sequence are right in the cache, `results` go to who waits for them, and
    `ended` says whether they are the last."""

    computed: int
    results: Sequence[Any]
    ended: bool


class Job(Running, ABC):
    """A request under way. `handover` is where its results go; `came`: when it was asked for, `begun`: when
    its first piece was computed, by time.monotonic."""

    new_tokens = 0  # generated

    def __init__(self, prompt: Sequence[int], handover: Handover[Any], shares: bool = True) -> None:
        super().__init__(list(prompt), shares)
        self.handover = handover
        self.came = time.monotonic()
        self.begun: float | None = None

    @abstractmethod
    def rows(self, piece: PromptPiece[Job]) -> Sequence[int]:
        """Of which of the piece's tokens logits and hidden states are needed."""

    @abstractmethod
    def receive(self, piece: PromptPiece[Job], logits: Logits, hidden: Hidden) -> Received:
        """Takes those of `rows`."""


class GenerateJob(Job):
    """A guess is compared with the token that nibble's own sampling draws at its place, which depends on nothing but
    logits, seed and position: what comes out is the same with and without guesses, whatever the sampling."""

    def __init__(self, request: TokenRequest, context: int, handover: Handover[Token]) -> None:
        super().__init__([*request.prompt, *request.generated], handover)
        self._request = request
        self._limit = min(request.max_tokens, context - len(request.prompt)) - len(request.generated)
        eos_ids, mask = request.eos_token_ids, request.mask
        self._sampler = Sampler(request.sampling, request.prompt, eos_ids, mask, request.generated)

    @property
    def guessable(self) -> int:
        return self._limit - self.new_tokens - 1

    def rows(self, piece: PromptPiece[Job]) -> Sequence[int]:
        count = len(piece.tokens)
        return range(count - piece.guessed - 1, count) if piece.last else ()

    def receive(self, piece: PromptPiece[Job], logits: Logits, hidden: Hidden) -> Received:
        computed = piece.start + len(piece.tokens) - piece.guessed
        drawn: list[Token] = []
        for row, guess in zip(logits, [*piece.tokens[len(piece.tokens) - piece.guessed :], None], strict=False):
            token = self._next(row)
            drawn.append(token)
            if token.finish_reason or token.id != guess:
                break
            computed += 1
        return Received(computed, drawn, any(token.finish_reason for token in drawn))

    def _next(self, logits: Logits) -> Token:
        request = self._request
        token = self._sampler.next(logits)
        self.tokens.append(token)
        self.new_tokens += 1
        reason: FinishReason | None = "length" if self.new_tokens == self._limit else None
        if token in request.eos_token_ids:
            reason = "stop"
        how = self._how_it_began() if self.new_tokens == 1 else ()
        if request.logprobs is None:
            return Token(token, reason, None, (), *how)
        return Token(token, reason, *log_probabilities(logits, token, request.logprobs), *how)

    def _how_it_began(self) -> tuple[int, float, float]:
        """Tokens reused, seconds waited, seconds computed."""
        begun = self.came if self.begun is None else self.begun
        return min(self.reused or 0, len(self._request.prompt)), begun - self.came, time.monotonic() - begun


class ScoreJob(Job):
    """Needs the logits of every token, so it shares nothing that was computed before."""

    def __init__(self, prompt: Sequence[int], logprobs: int, handover: Handover[list[Token]]) -> None:
        super().__init__(prompt, handover, shares=False)
        self._logprobs = logprobs
        self._scored = [Token(prompt[0])]

    def rows(self, piece: PromptPiece[Job]) -> Sequence[int]:
        return range(len(piece.tokens))

    def receive(self, piece: PromptPiece[Job], logits: Logits, hidden: Hidden) -> Received:
        for position, row in enumerate(logits, piece.start + 1):
            # Where it had to give its blocks up, positions come a second time.
            if position == len(self._scored) < len(self.tokens):
                token = self.tokens[position]
                self._scored.append(Token(token, None, *log_probabilities(row, token, self._logprobs)))
        return Received(piece.start + len(piece.tokens), [self._scored] if piece.last else [], piece.last)


class EmbedJob(Job):
    def rows(self, piece: PromptPiece[Job]) -> Sequence[int]:
        return (len(piece.tokens) - 1,) if piece.last else ()

    def receive(self, piece: PromptPiece[Job], logits: Logits, hidden: Hidden) -> Received:
        return Received(piece.start + len(piece.tokens), [hidden[-1].tolist()] if piece.last else [], piece.last)
