"""The messages of protos/inference.proto as the records of `schema.py`, which HTTP's requests become too,
and what is generated as messages. Errors name the fields as HTTP's do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from cluster.errors import InvalidRequestError
from deployments.api.requests.parsing import parse, strict_json
from deployments.api.requests.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from deployments.records import GenerationChunk, LoggedToken, ToolCall, ToolCallPiece
from deployments.routing.sequences import WholeSequence
from protos import inference_pb2 as pb

# Fields whose names and values are those of the record, set or left out.
PLAIN_FIELDS = (
    "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty",
    "presence_penalty", "seed", "ignore_eos", "n", "best_of", "echo", "user",
    "priority",
)  # fmt: skip


def generation_record(request: pb.GenerateRequest, stream: bool) -> CompletionRequest | ChatRequest:
    """Raises InvalidRequestError."""
    body: dict[str, Any] = {name: getattr(request, name) for name in PLAIN_FIELDS if request.HasField(name)}
    body |= {"model": request.model, "stream": stream, "stop": list(request.stop)}
    body["logit_bias"] = {str(token): bias for token, bias in request.logit_bias.items()}
    body |= format_fields(request)
    if request.WhichOneof("input") == "chat":
        body |= {"messages": messages(request.chat), **tool_fields(request)}
        if request.HasField("logprobs"):
            body |= {"logprobs": True, "top_logprobs": request.logprobs}
        return parse(ChatRequest, body)
    if request.HasField("logprobs"):
        body["logprobs"] = request.logprobs
    match request.WhichOneof("input"):
        case "prompt":
            body["prompt"] = request.prompt
        case "prompt_tokens":
            body["prompt"] = list(request.prompt_tokens.ids)
        case "prompts":
            body["prompt"] = prompt_values(request.prompts.prompts)
    return parse(CompletionRequest, body)


def tokenize_record(request: pb.TokenizeRequest) -> TokenizeRequest:
    """Raises InvalidRequestError."""
    body: dict[str, Any] = {"model": request.model}
    if request.HasField("add_special_tokens"):
        body["add_special_tokens"] = request.add_special_tokens
    match request.WhichOneof("input"):
        case "prompt":
            body["prompt"] = request.prompt
        case "chat":
            body |= {"messages": messages(request.chat), "tools": tools(request.chat)}
    return parse(TokenizeRequest, body)


def detokenize_record(request: pb.DetokenizeRequest) -> DetokenizeRequest:
    """Raises InvalidRequestError."""
    return parse(DetokenizeRequest, {"model": request.model, "tokens": list(request.tokens)})


def embedding_record(request: pb.EmbedRequest) -> EmbeddingRequest:
    """Raises InvalidRequestError."""
    return parse(EmbeddingRequest, {"model": request.model, "input": prompt_values(request.inputs)})


def prompt_values(prompts: Iterable[pb.Prompt]) -> list[Any]:
    """One of neither kind is None, which the record refuses."""
    values: dict[str | None, Any] = {"text": lambda each: each.text, "tokens": lambda each: list(each.tokens.ids)}
    return [values.get(each.WhichOneof("kind"), lambda _: None)(each) for each in prompts]


def messages(chat: pb.Chat) -> list[dict[str, Any]]:
    return [
        {
            "role": message.role,
            "content": message.content,
            "tool_call_id": message.tool_call_id if message.HasField("tool_call_id") else None,
            "tool_calls": [
                {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
                for call in message.tool_calls
            ],
        }
        for message in chat.messages
    ]


def tools(chat: pb.Chat) -> list[dict[str, Any]]:
    """Raises InvalidRequestError for parameters that are no JSON object."""
    found = []
    for index, tool in enumerate(chat.tools):
        function: dict[str, Any] = {"name": tool.name, "description": tool.description or None}
        if tool.parameters:
            function["parameters"] = json_object(tool.parameters, f"tools[{index}].function.parameters")
        found.append({"type": "function", "function": function})
    return found


def tool_fields(request: pb.GenerateRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {"tools": tools(request.chat)}
    match request.WhichOneof("tool_use"):
        case "tool_choice":
            fields["tool_choice"] = request.tool_choice
        case "tool_function":
            fields["tool_choice"] = named_tool(request.tool_function)
    if request.allowed_tools:
        if request.HasField("tool_function"):
            raise InvalidRequestError("allowed_tools: not together with tool_function", "allowed_tools")
        allowed = [named_tool(name) for name in request.allowed_tools]
        mode = fields.get("tool_choice", "auto")
        fields["tool_choice"] = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": allowed}}
    if request.HasField("parallel_tool_calls"):
        fields["parallel_tool_calls"] = request.parallel_tool_calls
    return fields


def named_tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def tool_calls(piece: WholeSequence | GenerationChunk) -> list[pb.ToolCall]:
    """Of a whole message, or the pieces of a streamed one."""
    calls: Sequence[ToolCall | ToolCallPiece] = piece.message.tool_calls if piece.message is not None else ()
    return [
        pb.ToolCall(
            index=call.index if isinstance(call, ToolCallPiece) else index,
            id=call.id or "",
            name=call.name or "",
            arguments=call.arguments,
        )
        for index, call in enumerate(calls)
    ]


def format_fields(request: pb.GenerateRequest) -> dict[str, Any]:
    match request.WhichOneof("format"):
        case "json_object" if request.json_object:
            return {"response_format": {"type": "json_object"}}
        case "json_schema":
            schema = json_object(request.json_schema, "json_schema")
            return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
        case "grammar":
            return {"grammar": request.grammar}
    return {}


def json_value(text: str, field: str) -> Any:
    """Raises InvalidRequestError, naming the field, for what is no JSON (NaN and Infinity are none)."""
    try:
        return strict_json(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{field}: not valid JSON: {error}", field) from None


def json_object(text: str, field: str) -> dict[str, Any]:
    """Raises InvalidRequestError for any other value, too."""
    value = json_value(text, field)
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{field}: found a JSON {type(value).__name__}, expected an object", field)
    return value


def token_logprobs(tokens: Sequence[LoggedToken]) -> list[pb.TokenLogprob]:
    return [
        pb.TokenLogprob(
            id=token.id,
            token=token.data,
            logprob=token.logprob,
            top=[pb.TopLogprob(id=id, token=data, logprob=logprob) for id, data, logprob in token.top],
            text_offset=token.offset,
        )
        for token in tokens
    ]
