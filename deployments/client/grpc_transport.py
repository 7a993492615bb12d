"""The client's gRPC side: the HTTP API's fields as the messages of protos/inference.proto, and back."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.errors import InvalidRequestError, NibbleError, RateLimitError, RequestTooLargeError
from deployments.client.messages import (
    REQUEST_ID,
    Call,
    Choice,
    Completion,
    Embeddings,
    Event,
    Messages,
    Model,
    Piece,
    Prompt,
    TokenLogprob,
    Tokens,
    Usage,
    Wire,
    made_error,
    no_server,
    token_text,
)
from deployments.status import STATUSES
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub

SEEDS = 1 << 64
# Embeddings may be more than gRPC's 4 MiB.
CHANNEL_OPTIONS = (("grpc.max_receive_message_length", -1),)

# Two errors may share a code; nibble's messages then tell them apart.
SIGNS: tuple[tuple[type[NibbleError], str], ...] = (
    (RateLimitError, r"API key "),
    (RequestTooLargeError, r"message: .*\(limits\.body_bytes\)"),
)
# How gRPC's own library words that no server answers, or none any more.
UNREACHED = re.compile(r"failed to connect|DNS|name resolution|socket closed|connection|GOAWAY|recvmsg", re.IGNORECASE)


class GrpcWire:
    def complete(self, model: str, prompt: Prompt, options: dict[str, Any], stream: bool) -> Call:
        request = pb.GenerateRequest(model=model)
        with_field("prompt", lambda: put_prompt(request, prompt))
        put_options(request, options)
        return generating(request, stream, chat=False)

    def chat(self, model: str, messages: Messages, options: dict[str, Any], stream: bool) -> Call:
        request = pb.GenerateRequest(model=model)
        request.chat.CopyFrom(conversation(messages))
        put_options(request, chat_options(options))
        return generating(request, stream, chat=True)

    def tokenize(self, model: str, prompt: str | Messages, add_special_tokens: bool) -> Call:
        request = pb.TokenizeRequest(model=model, add_special_tokens=add_special_tokens)
        if isinstance(prompt, str):
            request.prompt = prompt
        else:
            request.chat.CopyFrom(conversation(prompt))
        return Call("Tokenize", request, lambda found, _: Tokens(tuple(found.tokens), found.max_model_len))

    def detokenize(self, model: str, tokens: Sequence[int]) -> Call:
        request = with_field("tokens", lambda: pb.DetokenizeRequest(model=model, tokens=tokens))
        return Call("Detokenize", request, lambda found, _: found.prompt)

    def embed(self, model: str, input: Prompt) -> Call:
        one = isinstance(input, str) or is_token_ids(input)
        inputs = with_field("input", lambda: [prompt_message(each) for each in ([input] if one else input)])

        def read(found: Any, _: str | None) -> Embeddings:
            return Embeddings(found.model, tuple(tuple(each.values) for each in found.embeddings), found.prompt_tokens)

        return Call("Embed", pb.EmbedRequest(model=model, inputs=inputs), read)

    def models(self) -> Call:
        def read(found: Any, _: str | None) -> list[Model]:
            return [Model(m.id, m.family, m.engine, m.quantization, m.context, m.ready) for m in found.models]

        return Call("ListModels", pb.ListModelsRequest(), read)


def with_field(name: str, make: Callable[[], Any]) -> Any:
    """Raises InvalidRequestError, naming the field, for a value that the message cannot hold."""
    try:
        return make()
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise InvalidRequestError(f"{name}: cannot be sent over gRPC: {error}", name) from None


def is_token_ids(prompt: Any) -> bool:
    return bool(prompt) and all(isinstance(each, int) for each in prompt)


def prompt_message(prompt: Any) -> Any:
    return pb.Prompt(text=prompt) if isinstance(prompt, str) else pb.Prompt(tokens=pb.TokenIds(ids=prompt))


def put_prompt(request: Any, prompt: Any) -> None:
    if isinstance(prompt, str):
        request.prompt = prompt
    elif is_token_ids(prompt):
        request.prompt_tokens.ids.extend(prompt)
    else:
        request.prompts.CopyFrom(pb.Prompts(prompts=[prompt_message(each) for each in prompt]))


def conversation(messages: Messages) -> Any:
    """As the HTTP API has it: content may be parts of text, and `developer` is another word for system."""
    written = []
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if further := sorted(key for key in message if key not in ("role", "content") and message[key] is not None):
            raise InvalidRequestError(f"{name}.{further[0]}: not supported over gRPC", f"{name}.{further[0]}")
        written.append(with_field(name, partial(chat_message, message)))
    return pb.Chat(messages=written)


def chat_message(message: Mapping[str, Any]) -> Any:
    role, content = message["role"], message["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return pb.ChatMessage(role="system" if role == "developer" else role, content=text)


def chat_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """A chat's options by the names that a completion has for them."""
    given = dict(options)
    wanted, top = given.pop("logprobs", None), given.pop("top_logprobs", None)
    if wanted:
        given["logprobs"] = top or 0
    elif top is not None:
        raise InvalidRequestError("top_logprobs: allowed only with logprobs: true", "top_logprobs")
    limit = given.pop("max_completion_tokens", None)
    return given if limit is None else given | {"max_tokens": limit}


def put_options(request: Any, options: Mapping[str, Any]) -> None:
    """Null is left out, as over HTTP; a field that gRPC has not is refused."""
    for name, value in options.items():
        if value is not None:
            with_field(name, partial(put_option, request, name, value))


def put_option(request: Any, name: str, value: Any) -> None:
    match name:
        case "stop":
            request.stop.extend([value] if isinstance(value, str) else value)
        case "logit_bias":
            request.logit_bias.update({int(token): bias for token, bias in value.items()})
        case "response_format":
            put_format(request, value)
        case "top_k" if value == -1:  # off, as 0 is
            request.top_k = 0
        case "seed" if isinstance(value, int) and -(SEEDS >> 1) <= value < 0:
            request.seed = value % SEEDS
        case _ if name in SCALARS:
            setattr(request, name, value)
        case _:
            allowed = ", ".join(sorted((*SCALARS, "stop", "logit_bias", "response_format")))
            raise InvalidRequestError(f"{name}: not supported over gRPC; allowed are {allowed}", name)


SCALARS = frozenset(
    field.name
    for field in pb.GenerateRequest.DESCRIPTOR.fields
    if field.message_type is None and field.name not in ("model", "prompt", "stop", "json_object", "json_schema")
)


def put_format(request: Any, form: Mapping[str, Any]) -> None:
    match form["type"]:
        case "json_object":
            request.json_object = True
        case "json_schema":
            request.json_schema = json.dumps(form["json_schema"]["schema"])
        case "text":
            pass
        case other:
            raise ValueError(f"found type {other!r}, allowed are text, json_object, json_schema")


def generating(request: Any, stream: bool, chat: bool) -> Call:
    wanted = request.HasField("logprobs")

    def fields(choice: Any) -> tuple[int, str, str | None, tuple[TokenLogprob, ...] | None]:
        reason = choice.finish_reason if choice.HasField("finish_reason") else None
        return choice.index, choice.text, reason, logprobs(choice.logprobs, chat) if wanted else None

    def read(found: Any, request_id: str | None) -> Completion:
        choices = tuple(Choice(*fields(choice)) for choice in found.choices)
        return Completion(found.id, request_id or found.id, found.created, found.model, choices, usage(found.usage))

    def read_event(found: Any, request_id: str | None) -> Event:
        piece = Piece(*fields(found.choice))
        pieces = (piece,) if piece.text or piece.finish_reason or piece.logprobs else ()
        total = usage(found.usage) if found.HasField("usage") else None
        return Event(found.id, found.model, pieces, total, request_id or found.id)

    return Call("GenerateStream", request, read_event) if stream else Call("Generate", request, read)


def logprobs(tokens: Iterable[Any], chat: bool) -> tuple[TokenLogprob, ...]:
    """With one entry for each text among the most likely ones, which is all that HTTP can say."""
    return tuple(
        TokenLogprob(
            token_text(each.token),
            each.logprob if each.HasField("logprob") else None,
            tuple({token_text(top.token): top.logprob for top in each.top}.items()),
            None if chat else each.text_offset,
        )
        for each in tokens
    )


def usage(found: Any) -> Usage:
    return Usage(found.prompt_tokens, found.completion_tokens, found.total_tokens)


def error_of(url: str, error: Any) -> NibbleError:
    """The server's error by the table that it has its code from."""
    code, message = error.code(), error.details() or ""
    metadata = dict(error.trailing_metadata() or ())
    if code is grpc.StatusCode.UNAVAILABLE and REQUEST_ID not in metadata and UNREACHED.search(message):
        return no_server(url, message)
    kinds = [kind for kind, status in STATUSES.items() if status.grpc is code]
    if not kinds:
        return NibbleError(f"{url}: gRPC {code.name}: {message}")
    kind = next((kind for kind, sign in SIGNS if kind in kinds and re.match(sign, message)), kinds[0])
    # Messages begin with the field that they are about.
    named = re.match(r"([a-z_]\w*(?:\[\d+\]|\.\w+)*): ", message)
    return made_error(kind, message, named[1] if named else None, metadata.get("retry-after"))


class Connection:
    """What the blocking and the asynchronous transport share. `module` is grpc or grpc.aio."""

    def __init__(self, module: Any, url: str, api_key: str | None, timeout: float) -> None:
        self.wire: Wire = GrpcWire()
        self.url = url
        self.timeout = timeout
        self._api_key = api_key
        scheme, _, target = url.partition("://")
        if scheme == "grpcs":
            credentials = grpc.ssl_channel_credentials()
            self.channel = module.secure_channel(target, credentials, options=CHANNEL_OPTIONS)
        else:
            self.channel = module.insecure_channel(target, options=CHANNEL_OPTIONS)
        self.stub: Any = InferenceStub(self.channel)  # type: ignore[no-untyped-call]
        self.health: Any = health_pb2_grpc.HealthStub(self.channel)

    def settings(self, call: Call | None = None) -> dict[str, Any]:
        metadata = [("authorization", f"Bearer {self._api_key}")] if self._api_key else []
        if call is not None and call.request_id is not None:
            metadata.append((REQUEST_ID, call.request_id))
        return {"timeout": self.timeout, "metadata": metadata}


class GrpcTransport(Connection):
    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        super().__init__(grpc, url, api_key, timeout)

    def ask(self, call: Call) -> Any:
        try:
            found, rpc = getattr(self.stub, call.target).with_call(call.payload, **self.settings(call))
        except grpc.RpcError as error:
            raise error_of(self.url, error) from None
        return call.read(found, dict(rpc.trailing_metadata() or ()).get(REQUEST_ID))

    def stream(self, call: Call) -> Iterator[Event]:
        rpc = getattr(self.stub, call.target)(call.payload, **self.settings(call))
        try:
            for message in rpc:
                yield call.read(message, None)
        except grpc.RpcError as error:
            raise error_of(self.url, error) from None
        finally:
            rpc.cancel()

    def ready(self) -> bool:
        try:
            found = self.health.Check(health_pb2.HealthCheckRequest(), **self.settings())
        except grpc.RpcError as error:
            raise error_of(self.url, error) from None
        return bool(found.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        self.channel.close()


class AsyncGrpcTransport(Connection):
    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        super().__init__(grpc.aio, url, api_key, timeout)

    async def ask(self, call: Call) -> Any:
        rpc = getattr(self.stub, call.target)(call.payload, **self.settings(call))
        try:
            found = await rpc
        except grpc.RpcError as error:
            raise error_of(self.url, error) from None
        return call.read(found, dict(await rpc.trailing_metadata() or ()).get(REQUEST_ID))

    async def stream(self, call: Call) -> AsyncIterator[Event]:
        rpc = getattr(self.stub, call.target)(call.payload, **self.settings(call))
        try:
            async for message in rpc:
                yield call.read(message, None)
        except grpc.RpcError as error:
            raise error_of(self.url, error) from None
        finally:
            rpc.cancel()

    async def ready(self) -> bool:
        try:
            found = await self.health.Check(health_pb2.HealthCheckRequest(), **self.settings())
        except grpc.RpcError as error:
            raise error_of(self.url, error) from None
        return bool(found.status == health_pb2.HealthCheckResponse.SERVING)

    async def close(self) -> None:
        await self.channel.close()
