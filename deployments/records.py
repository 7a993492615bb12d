"""The records of a completion's life, which cross processes: what is asked for, and what comes back. Plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

FinishReason = Literal["stop", "length", "tool_calls"]


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


Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class ToolCall:
    """A call of a function by the model. `arguments` is a JSON object, unless the model failed."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    role: Role
    content: str
    name: str | None = None  # of the one who speaks, for templates that write it
    tool_calls: tuple[ToolCall, ...] = ()  # of the assistant
    tool_call_id: str | None = None  # what a tool's message answers


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. `definition` is what a chat template gets, as JSON: `{"type": "function",
    "function": {"name", "description", "parameters"}}`; `parameters` is the JSON schema of its arguments, as JSON."""

    name: str
    definition: str
    parameters: str


@dataclass(frozen=True)
class Conversation:
    """At least one message, and what the chat template is told. `add_generation_prompt`: the assistant's next message
    follows; `continue_final_message`: the last message goes on instead. `template_arguments`: further ones.
    `add_special_tokens`: those of the tokenizer, beside what the template writes; None: unless it wrote the BOS token.
    """

    messages: tuple[Message, ...]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_arguments: dict[str, Any] = field(default_factory=dict)
    add_special_tokens: bool | None = None
    tools: tuple[Tool, ...] = ()  # that the model is told of


@dataclass(frozen=True)
class ToolUse:
    """What a completion may do with the tools of its conversation: call those in `names`. `forced`: it consists of
    calls, one at least. `parallel`: there may be more than one."""

    names: tuple[str, ...]
    forced: bool = False
    parallel: bool = True


@dataclass(frozen=True)
class Grammar:
    """`text`: a JSON schema as JSON (kind json_schema; `{"type": "object"}` for any JSON object), or a grammar in
    Lark's or GBNF's syntax (kind grammar), or both as JSON (kind tool_calls): `rules` in Lark's syntax, in which
    `@arguments0`, ... are the JSON values of `schemas`, pairs of a tool's name and a schema. `field` names the
    request's field that it came from, for errors."""

    kind: Literal["json_schema", "grammar", "tool_calls"]
    text: str
    field: str


Prompt = str | tuple[int, ...] | Conversation
Trace = Mapping[str, str]  # traceparent and tracestate, as W3C Trace Context has them


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
    (unless `ignore_eos`), at one of the `stop_token_ids`, or at the first of the `stop` strings. What it ends at is
    left out of the text, and before `sampling.min_tokens` new tokens it ends at none of these. `max_tokens` 0 generates
    nothing. With `echo` the prompt's text comes first. `logprobs`: how many of the most likely tokens to report beside
    each token; None for no log probabilities. `timeout_s`: seconds from now until the caller no longer waits.
    `max_prompt_tokens`: the operator's own bound on the prompt. `truncate_prompt_tokens`: only so many of the prompt's
    last tokens are taken; -1: as many as fit. `add_special_tokens`: those of the tokenizer, to a prompt that is text.
    Without `skip_special_tokens` special tokens have a text, too. `return_token_ids`: the first chunk has the prompt's
    ids. `tool_use`: the text is read as a message that may call tools; of a conversation with tools only, and without
    `grammar`. `progress`: goes on with a completion that was begun elsewhere, behind the chunks that its caller has.
    `trace`: of the span whose children this completion's spans are; None: it is not traced.
    `session`: requests of the same one are best served by the same replica.
    """

    request_id: str
    prompt: Prompt
    max_tokens: int | None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    ignore_eos: bool = False
    echo: bool = False
    logprobs: int | None = None
    grammar: Grammar | None = None
    timeout_s: float | None = None
    max_prompt_tokens: int | None = None
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool = True
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    tool_use: ToolUse | None = None
    progress: Progress | None = None
    trace: Trace | None = None
    session: str | None = None


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
class ToolCallPiece:
    """Of the call at `index`, from 0 on: its id and name in the first piece, and what comes next of the arguments."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class MessagePiece:
    """Of an assistant's message with tools."""

    content: str
    tool_calls: tuple[ToolCallPiece, ...]


class EngineTimes(NamedTuple):
    """Seconds of a completion in its engine up to its first token: waiting, and computing."""

    queue_s: float
    prefill_s: float


@dataclass(frozen=True)
class GenerationChunk:
    """A piece of the completion: text that is final, and the tokens whose text begins in it. The last chunk of a
    completion, and only that one, has a finish_reason, and all tokens that were left. `completion_tokens` counts what
    was generated up to this chunk, an end token and tokens whose text is held back included. `logprobs`: of the tokens
    whose text this is (with echo, the first chunk has the prompt's), empty where none were asked for; an end token and
    what lies beyond a stop string have none. `prompt_token_ids`: in the first chunk, where they were asked for.
    `cached_tokens`: how many of the prompt's tokens the replica did not need to compute.
    `message`: what the text becomes, of a request with `tool_use`. `engine_times`: in the first chunk behind a token,
    unless the completion was begun elsewhere."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[LoggedToken, ...] = ()
    prompt_token_ids: tuple[int, ...] = ()
    cached_tokens: int = 0
    message: MessagePiece | None = None
    engine_times: EngineTimes | None = field(default=None, compare=False)  # how it came, not what it is
