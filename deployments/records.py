"""The records of a completion's life, which cross processes: what is asked for, and what comes back. Plain values."""

from __future__ import annotations

from dataclasses import dataclass, field

from deployments.engines.base import FinishReason, SamplingParams
from deployments.generation.chat import Conversation
from deployments.generation.grammar import Grammar

Prompt = str | tuple[int, ...] | Conversation


@dataclass(frozen=True)
class Progress:
    """How far a completion had come, by the chunks that its caller has: `prompt`, its token ids; `token_ids`, those of
    all chunks; `characters`, of all chunks' text, an echoed prompt's included."""

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    characters: int


@dataclass(frozen=True)
class GenerationRequest:
    """One completion. `prompt` is text, token ids or a conversation, which the model's chat template turns into text.

    Generation ends after `max_tokens` (None: no bound of its own), where the context is full, at the model's end token
    (unless `ignore_eos`), or at the first of the `stop` strings, which is left out of the text; before
    `sampling.min_tokens` new tokens it ends at neither. `max_tokens` 0 generates nothing. With `echo` the prompt's text
    comes first. `logprobs`: how many of the most likely tokens to report beside each token; None for no log
    probabilities. `timeout_s`: seconds from now until the caller no longer waits. `max_prompt_tokens`: the operator's
    own bound on the prompt. `progress`: goes on with a completion that was begun elsewhere, behind the chunks that its
    caller has.
    """

    request_id: str
    prompt: Prompt
    max_tokens: int | None
    stop: tuple[str, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    ignore_eos: bool = False
    echo: bool = False
    logprobs: int | None = None
    grammar: Grammar | None = None
    timeout_s: float | None = None
    max_prompt_tokens: int | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class LoggedToken:
    """A token of a text with its log probability (None for a prompt's first token) and the most likely ones at its
    place. `offset`: how many characters of the text (the prompt's included, with echo) come before it."""

    id: int
    data: bytes  # UTF-8, perhaps a part of a character
    logprob: float | None
    top: tuple[tuple[int, bytes, float], ...]
    offset: int


@dataclass(frozen=True)
class GenerationChunk:
    """A piece of the completion: text that is final, and the tokens whose text begins in it. The last chunk of a
    completion, and only that one, has a finish_reason, and all tokens that were left. `completion_tokens` counts what
    was generated up to this chunk, an end token and tokens whose text is held back included. `logprobs`: of the tokens
    whose text this is (with echo, the first chunk has the prompt's), empty where none were asked for; an end token and
    what lies beyond a stop string have none."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[LoggedToken, ...] = ()
