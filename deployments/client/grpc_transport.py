"""The client's gRPC side: the HTTP API's fields as the messages of protos/inference.proto, and back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.errors import InvalidRequestError
from deployments.client.grpc_errors import error_of
from deployments.client.grpc_messages import conversation, put_tools, tool_calls, with_field
from deployments.client.messages import (
    REQUEST_ID,
    Choice,
    ClientCall,
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
    says_something,
    token_text,
)
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub

SEEDS = 1 << 64
# Embeddings may be more than gRPC's 4 MiB.
CHANNEL_OPTIONS = (("grpc.max_receive_message_length", -1),)


class GrpcWire:
    def complete(self, model: str, prompt: Prompt, options: dict[str, Any], stream: bool) -> ClientCall:
        request = pb.GenerateRequest(model=model)
        with_field("prompt", lambda: put_prompt(request, prompt))
        put_options(request, options)
        return generating(request, stream, chat=False)

    def chat(self, model: str, messages: Messages, options: dict[str, Any], stream: bool) -> ClientCall:
        request = pb.GenerateRequest(model=model)
        request.chat.CopyFrom(conversation(messages))
        put_options(request, put_tools(request, chat_options(options)))
        return generating(request, stream, chat=True)

    def tokenize(self, model: str, prompt: str | Messages, add_special_tokens: bool) -> ClientCall:
        request = pb.TokenizeRequest(model=model, add_special_tokens=add_special_tokens)
        if isinstance(prompt, str):
            request.prompt = prompt
        else:
            request.chat.CopyFrom(conversation(prompt))
        return ClientCall("Tokenize", request, lambda found, _: Tokens(tuple(found.tokens), found.max_model_len))

    def detokenize(self, model: str, tokens: Sequence[int]) -> ClientCall:
        request = with_field("tokens", lambda: pb.DetokenizeRequest(model=model, tokens=tokens))
        return ClientCall("Detokenize", request, lambda found, _: found.prompt)

    def embed(self, model: str, input: Prompt) -> ClientCall:
        one = isinstance(input, str) or is_token_ids(input)
        inputs = with_field("input", lambda: [prompt_message(each) for each in ([input] if one else input)])

        def read(found: Any, _: str | None) -> Embeddings:
            return Embeddings(found.model, tuple(tuple(each.values) for each in found.embeddings), found.prompt_tokens)

        return ClientCall("Embed", pb.EmbedRequest(model=model, inputs=inputs), read)

    def models(self) -> ClientCall:
        def read(found: Any, _: str | None) -> list[Model]:
            return [Model(m.id, m.family, m.engine, m.quantization, m.context, m.ready) for m in found.models]

        return ClientCall("ListModels", pb.ListModelsRequest(), read)


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
            allowed = ", ".join(sorted((*SCALARS, "stop", "logit_bias", "response_format", "tools", "tool_choice")))
            raise InvalidRequestError(f"{name}: not supported over gRPC; allowed are {allowed}", name)


# What has a value of another form over HTTP.
NOT_SCALARS = ("model", "prompt", "stop", "json_object", "json_schema", "tool_choice", "tool_function", "allowed_tools")
SCALARS = frozenset(
    field.name
    for field in pb.GenerateRequest.DESCRIPTOR.fields
    if field.message_type is None and field.name not in NOT_SCALARS
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


def generating(request: Any, stream: bool, chat: bool) -> ClientCall:
    wanted = request.HasField("logprobs")

    def fields(choice: Any) -> tuple[Any, ...]:
        reason = choice.finish_reason if choice.HasField("finish_reason") else None
        logged = logprobs(choice.logprobs, chat) if wanted else None
        return choice.index, choice.text, reason, logged, tool_calls(choice)

    def read(found: Any, request_id: str | None) -> Completion:
        choices = tuple(Choice(*fields(choice)) for choice in found.choices)
        return Completion(found.id, request_id or found.id, found.created, found.model, choices, usage(found.usage))

    def read_event(found: Any, request_id: str | None) -> Event:
        piece = Piece(*fields(found.choice))
        pieces = (piece,) if says_something(piece) else ()
        total = usage(found.usage) if found.HasField("usage") else None
        return Event(found.id, found.model, pieces, total, request_id or found.id)

    return ClientCall("GenerateStream", request, read_event) if stream else ClientCall("Generate", request, read)


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


class GrpcConnection:
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

    def settings(self, call: ClientCall | None = None) -> dict[str, Any]:
        metadata = [("authorization", f"Bearer {self._api_key}")] if self._api_key else []
        if call is not None and call.request_id is not None:
            metadata.append((REQUEST_ID, call.request_id))
        return {"timeout": self.timeout, "metadata": metadata}


class GrpcTransport(GrpcConnection):
    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        super().__init__(grpc, url, api_key, timeout)

    def ask(self, call: ClientCall) -> Any:
        try:
            found, rpc = getattr(self.stub, call.target).with_call(call.payload, **self.settings(call))
        except grpc.RpcError as error:
            raise error_of(self.url, error) from None
        return call.read(found, dict(rpc.trailing_metadata() or ()).get(REQUEST_ID))

    def stream(self, call: ClientCall) -> Iterator[Event]:
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


class AsyncGrpcTransport(GrpcConnection):
    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        super().__init__(grpc.aio, url, api_key, timeout)

    async def ask(self, call: ClientCall) -> Any:
        rpc = getattr(self.stub, call.target)(call.payload, **self.settings(call))
        try:
            found = await rpc
        except grpc.RpcError as error:
            raise error_of(self.url, error) from None
        return call.read(found, dict(await rpc.trailing_metadata() or ()).get(REQUEST_ID))

    async def stream(self, call: ClientCall) -> AsyncIterator[Event]:
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
