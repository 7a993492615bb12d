"""What every engine is: token ids in, token ids out. Text, stop strings and detokenization live above it, so that all
engines share them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How one next token is drawn from the logits.

    temperature 0 is greedy (the other filters then have no effect but biases and penalties still do); top_k 0, top_p 1
    and min_p 0 are off; min_p is a fraction of the most likely token's probability. Penalties are as OpenAI (frequency,
    presence) and Hugging Face (repetition) define them. `logit_bias`: pairs of a token id and what is added to its
    logit. Before `min_tokens` new tokens no token ends the text. The draw for the token at absolute position p is a
    function of (seed, p) alone, so that another replica can take over a sequence.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    seed: int = 0


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
    where it was asked for, and the most likely tokens at its place, by falling log probability, then id."""

    id: int
    finish_reason: FinishReason | None = None  # set on the last token only
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


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
        """What `nibble status` shows of the engine: instruction set, threads, counters."""
        ...

    def close(self) -> None: ...
