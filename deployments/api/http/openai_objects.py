"""OpenAI's response objects: their types, which the OpenAPI document shows too, and how completions become them."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, Literal

from typing_extensions import NotRequired, TypedDict

from deployments.records import FinishReason, GenerationChunk, LoggedToken, ToolCallPiece
from deployments.routing.router import ModelCard
from deployments.routing.sequences import WholeSequence


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class UsageObject(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: NotRequired[PromptTokensDetails]


class Logprobs(TypedDict):
    """Of a completion: one entry a token, the prompt's first with echo, whose log probability is null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    text: str
    index: int
    logprobs: Logprobs | None
    finish_reason: FinishReason | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]


class CompletionObject(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[UsageObject | None]


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[ContentLogprob]


class FunctionCallObject(TypedDict):
    name: str
    arguments: str


class ToolCallObject(TypedDict):
    id: str
    type: Literal["function"]
    function: FunctionCallObject


class ChatMessageObject(TypedDict):
    role: Literal["assistant"]
    content: str | None
    tool_calls: NotRequired[list[ToolCallObject]]


class ChatChoice(TypedDict):
    index: int
    message: ChatMessageObject
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    token_ids: NotRequired[list[int]]


class ChatObject(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageObject
    prompt_token_ids: NotRequired[list[int]]


class ModelObject(TypedDict):
    """OpenAI's; `root`, `parent` and `max_model_len` as vLLM has them, the rest nibble's."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int
    family: str
    engine: str
    quantization: str
    context: int
    ready: bool


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelObject]


class TokensObject(TypedDict):
    tokens: list[int]
    count: int
    max_model_len: int


class Text(TypedDict):
    prompt: str


class Embedding(TypedDict):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(TypedDict):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorObject(TypedDict):
    error: ErrorDetail


def usage_object(prompt_tokens: int, completion_tokens: int, cached_tokens: int | None = None) -> UsageObject:
    total = prompt_tokens + completion_tokens
    usage: UsageObject = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": total,
    }
    if cached_tokens is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": cached_tokens}
    return usage


def completion_object(
    id: str, created: int, model: str, choices: Sequence[WholeSequence], usage: UsageObject, with_logprobs: bool = False
) -> CompletionObject:
    objects = [
        completion_choice(index, c.text, c.finish_reason, completion_logprobs(c.logprobs) if with_logprobs else None)
        for index, c in enumerate(choices)
    ]
    return {**completion_chunk(id, created, model, objects), "usage": usage}


def completion_chunk(id: str, created: int, model: str, choices: list[CompletionChoice]) -> CompletionObject:
    """One event of a stream."""
    return {"id": id, "object": "text_completion", "created": created, "model": model, "choices": choices}


def completion_choice(
    index: int, text: str, finish_reason: FinishReason | None, logprobs: Logprobs | None
) -> CompletionChoice:
    return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish_reason}


def completion_logprobs(tokens: Sequence[LoggedToken]) -> Logprobs:
    return {
        "tokens": [token_text(token.data) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        # The first token of a prompt has no probability, nor others at its place.
        "top_logprobs": [
            {token_text(data): logprob for _, data, logprob in token.top} if token.logprob is not None else None
            for token in tokens
        ],
        "text_offset": [token.offset for token in tokens],
    }


def token_text(data: bytes) -> str:
    """OpenAI writes a part of a character as `bytes:` and its hexadecimal escapes."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + codecs.escape_encode(data)[0].decode()


def chat_object(
    id: str, created: int, model: str, choices: Sequence[WholeSequence], usage: UsageObject, with_logprobs: bool = False
) -> ChatObject:
    objects: list[ChatChoice] = [
        {
            "index": index,
            "message": chat_message(completion),
            "logprobs": chat_logprobs(completion.logprobs) if with_logprobs else None,
            "finish_reason": completion.finish_reason,
        }
        for index, completion in enumerate(choices)
    ]
    return {
        "id": id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": objects,
        "usage": usage,
    }


def chat_message(completion: WholeSequence) -> ChatMessageObject:
    """Content that is empty beside tool calls is null."""
    message = completion.message
    if message is None:
        return {"role": "assistant", "content": completion.text}
    if not message.tool_calls:
        return {"role": "assistant", "content": message.content}
    calls: list[ToolCallObject] = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in message.tool_calls
    ]
    return {"role": "assistant", "content": message.content or None, "tool_calls": calls}


def tool_call_delta(piece: ToolCallPiece) -> dict[str, Any]:
    """A piece of a streamed call, in a delta's `tool_calls`."""
    if piece.name is None:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": function}


def token_ids(piece: WholeSequence | GenerationChunk) -> dict[str, list[int]]:
    """vLLM's, of a completion or a chunk of one; the prompt's in the first chunk."""
    prompt = {"prompt_token_ids": list(piece.prompt_token_ids)} if piece.prompt_token_ids else {}
    return {"token_ids": list(piece.token_ids), **prompt}


def with_token_ids(answer: CompletionObject, choices: Sequence[WholeSequence]) -> Any:
    return {**answer, "choices": [{**c, **token_ids(w)} for c, w in zip(answer["choices"], choices, strict=True)]}


def with_chat_token_ids(answer: ChatObject, choices: Sequence[WholeSequence]) -> Any:
    """The prompt's stand beside the choices, which share it."""
    objects = [{**c, "token_ids": list(w.token_ids)} for c, w in zip(answer["choices"], choices, strict=True)]
    return {**answer, "choices": objects, "prompt_token_ids": list(choices[0].prompt_token_ids)}


def chat_chunk(id: str, created: int, model: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    """One event of a stream."""
    return {"id": id, "object": "chat.completion.chunk", "created": created, "model": model, "choices": choices}


def chat_choice(
    index: int, delta: dict[str, Any], finish_reason: FinishReason | None, logprobs: ChatLogprobs | None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def chat_logprobs(tokens: Sequence[LoggedToken]) -> ChatLogprobs:
    return {
        "content": [
            {
                **top_logprob(token.data, token.logprob or 0.0),
                "top_logprobs": [top_logprob(d, p) for _, d, p in token.top],
            }
            for token in tokens
        ]
    }


def top_logprob(data: bytes, logprob: float) -> TopLogprob:
    return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}


def model_object(card: ModelCard, created: int) -> ModelObject:
    fixed = {"object": "model", "created": created, "owned_by": "nibble", "parent": None}
    return {**fixed, "max_model_len": card.context, **card._asdict()}  # type: ignore[typeddict-item]
