"""The records of a completion's life, which cross processes: what is asked for, and what comes back. Plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

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


Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]  # at least one


@dataclass(frozen=True)
class Grammar:
    """`text`: a JSON schema as JSON (kind json_schema; `{"type": "object"}` for any JSON object), or a grammar in
    Lark's or GBNF's syntax (kind grammar). `field` names the request's field that it came from, for errors."""

    kind: Literal["json_schema", "grammar"]
    text: str
    field: str


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
