"""What every engine is: token ids in, token ids out. Text, stop strings and detokenization live above it, so that all
engines share them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from deployments.records import FinishReason, SamplingParams

Logits = npt.NDArray[np.float32]


class TokenMask(Protocol):
    """The tokens that a grammar allows next, along one sequence of new tokens."""

    def apply(self, logits: Logits) -> None:
        """Sets what is not allowed next to -inf, in place; at least one token stays."""
        ...

    def accept(self, token: int) -> None:
        """Goes on by one token, which `apply` allowed."""
        ...


@dataclass(frozen=True)
class TokenRequest:
    """`prompt`: at least one token id, shorter than the engine's context. Generation ends after `max_tokens` new tokens
    (at least 1), when the context is full, or at a token of `eos_token_ids`, which is then the last one yielded.
    `logprobs`: how many of the most likely tokens to report beside each new one; None for no log probabilities.
    `generated`: the first new tokens, where another engine drew them before: this one goes on behind them as that one
    would have. They are not yielded again, count towards `max_tokens` and are fewer."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    mask: TokenMask | None = None
    generated: Sequence[int] = ()


@dataclass(frozen=True)
class Token:
    """A token with its natural log probability by the model itself (before biases, penalties, masks and temperature),
    where it was asked for, and the most likely tokens at its place, by falling log probability, then id. `reused`: on a
    request's first token, how many of the prompt's tokens were in the KV cache already. `queued_s` and
    `prefill_s`: on that token, how long the request had waited in the engine, and how long it was then computed."""

    id: int
    finish_reason: FinishReason | None = None  # set on the last token only
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    # These say how the token came, not which one it is.
    reused: int = field(default=0, compare=False)
    queued_s: float = field(default=0.0, compare=False)
    prefill_s: float = field(default=0.0, compare=False)


class Engine(Protocol):
    """A loaded artifact with a fixed number of threads."""

    name: str
    context: int  # tokens: prompt and completion together
    vocab_size: int
    threads: int

    def generate(self, request: TokenRequest) -> AsyncGenerator[list[Token], None]:
        """Yields the new tokens in order, each list holding those that became ready since the last one was taken.

        Closing the generator (or cancelling the task that iterates it) stops the engine before its next token.
        """
        ...

    async def score(self, prompt: Sequence[int], logprobs: int) -> list[Token]:
        """The prompt's own tokens with the log probability of each after those before it (None for the first), and the
        `logprobs` most likely ones at its place."""
        ...

    async def embed(self, prompt: Sequence[int]) -> list[float]:
        """The model's last hidden state after the prompt's last token, [width], as the runtime gives it. Raises
        InvalidRequestError where this engine has none."""
        ...

    def info(self) -> dict[str, str | int | float]:
        """What `nibble status` and /metrics show of the engine: instruction set, threads, counters; `running` and
        `waiting`: its sequences. Called beside the engine's own thread, and cheap."""
        ...

    def check_health(self, stall_s: float | None) -> None:
        """Raises EngineError where it cannot compute any more, or a step takes longer than `stall_s` seconds."""
        ...

    def close(self) -> None: ...
