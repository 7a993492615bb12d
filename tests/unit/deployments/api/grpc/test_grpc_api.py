from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from cluster.errors import DeadlineError, NibbleError, QueueFullError
from deployments.api.grpc.grpc_api import GrpcApi
from deployments.api.grpc.grpc_services import MalformedMessage
from deployments.records import Conversation, Grammar, Message
from protos import inference_pb2 as pb
from protos import open_inference_pb2
from tests.unit.fakes import EchoModel
from tests.unit.grpc_fakes import CHAT, Context, api_of, ask, drained, stream

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
def api(model: EchoModel) -> GrpcApi:
    return api_of(model)


async def test_generate_answers_whole(api: GrpcApi) -> None:
    context = Context()
    answer = await api.Generate(ask(prompt="to be"), context)
    (choice,) = answer.choices
    assert (choice.index, choice.text, choice.finish_reason, list(choice.token_ids)) == (0, "to be ", "stop", [0, 1])
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 2, 4)
    assert (answer.model, answer.id, not choice.logprobs) == ("echo", context.trailing["x-request-id"], True)
    assert context.code is None


async def test_generate_stream_ends_with_reason_and_usage(api: GrpcApi, model: EchoModel) -> None:
    messages = await stream(api, ask(prompt="to be or"))
    assert [message.choice.text for message in messages] == ["to ", "be ", "or "]
    assert [message.choice.HasField("finish_reason") for message in messages] == [False, False, True]
    assert [message.HasField("usage") for message in messages] == [False, False, True]
    assert messages[-1].usage.completion_tokens == 3
    assert len({message.id for message in messages}) == 1
    assert model.closed == 1


async def test_usage_comes_once_in_a_stream_of_several_choices(api: GrpcApi) -> None:
    prompts = pb.Prompts(prompts=[pb.Prompt(text="a b"), pb.Prompt(text="c d e")])
    messages = await stream(api, ask(prompts=prompts, n=2))
    texts = ["".join(m.choice.text for m in messages if m.choice.index == index) for index in range(4)]
    assert texts == ["a b ", "a b ", "c d e ", "c d e "]
    assert [message.HasField("usage") for message in messages] == [False] * (len(messages) - 1) + [True]
    usage = messages[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 10, 15)


async def test_every_field_reaches_the_replica_zero_included(api: GrpcApi, model: EchoModel) -> None:
    await api.Generate(
        ask(
            prompt="a", max_tokens=7, min_tokens=3, temperature=0, top_p=0.5, top_k=2, min_p=0.25,
            repetition_penalty=1.5, frequency_penalty=-1, presence_penalty=2, logit_bias={5: -100, 6: 1.5}, seed=0,
            stop=["x", "y"], ignore_eos=True, echo=True, logprobs=0,
        ),
        Context(),
    )  # fmt: skip
    (request,) = model.requests
    sampling = request.sampling
    assert (request.prompt, request.max_tokens, request.stop, request.ignore_eos) == ("a", 7, ("x", "y"), True)
    assert (request.echo, request.logprobs, sampling.min_tokens) == (True, 0, 3)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 0.5, 2, 0.25)
    assert (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty) == (1.5, -1, 2)
    assert (dict(sampling.logit_bias), sampling.seed) == ({5: -100, 6: 1.5}, 0)


async def test_unset_fields_take_the_defaults(api: GrpcApi, model: EchoModel) -> None:
    await api.Generate(ask(prompt="a"), Context())
    (request,) = model.requests
    assert (request.max_tokens, request.sampling.temperature, request.stop, request.echo) == (16, 1.0, (), False)
    assert (request.logprobs, request.grammar, request.timeout_s) == (None, None, 600)


@pytest.mark.parametrize(
    ("fields", "prompts"),
    [
        ({"prompt": "a b"}, ["a b"]),
        ({"prompt_tokens": pb.TokenIds(ids=[3, 4])}, [(3, 4)]),
        ({"prompts": pb.Prompts(prompts=[pb.Prompt(text="a"), pb.Prompt(text="b")])}, ["a", "b"]),
        ({"prompts": pb.Prompts(prompts=[pb.Prompt(tokens=pb.TokenIds(ids=[3]))] * 2)}, [(3,), (3,)]),
        ({"chat": CHAT}, [Conversation((Message("system", "Be brief."), Message("user", "a b")))]),
    ],
)
async def test_every_kind_of_input(api: GrpcApi, model: EchoModel, fields: dict[str, Any], prompts: list[Any]) -> None:
    answer = await api.Generate(ask(**fields), Context())
    assert [request.prompt for request in model.requests] == prompts
    assert [choice.index for choice in answer.choices] == list(range(len(prompts)))
    await stream(api, ask(**fields))
    assert [request.prompt for request in model.requests] == prompts * 2


async def test_a_chat_is_bounded_by_the_context_alone_and_has_logprobs(api: GrpcApi, model: EchoModel) -> None:
    answer = await api.Generate(ask(chat=CHAT, logprobs=1), Context())
    assert (model.requests[0].max_tokens, model.requests[0].logprobs) == (None, 1)
    assert [token.token for token in answer.choices[0].logprobs] == [b"a ", b"b "]


async def test_logprobs_whole_and_streamed(api: GrpcApi) -> None:
    whole = (await api.Generate(ask(prompt="to be", logprobs=1), Context())).choices[0].logprobs
    assert [(token.id, token.token, token.logprob, token.text_offset) for token in whole] == [
        (0, b"to ", -0.5, 0),
        (1, b"be ", -0.5, 3),
    ]
    assert [(top.id, top.token, top.logprob) for top in whole[0].top] == [(0, b"zero", -1.0)]
    messages = await stream(api, ask(prompt="to be", logprobs=1))
    assert [token for message in messages for token in message.choice.logprobs] == list(whole)


async def test_the_best_of_many_without_logprobs_unless_asked(api: GrpcApi, model: EchoModel) -> None:
    answer = await api.Generate(ask(prompt="a", best_of=3, n=2), Context())
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert not any(choice.logprobs for choice in answer.choices)
    assert (len(model.requests), model.requests[0].logprobs, answer.usage.completion_tokens) == (3, 0, 3)


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"json_object": True}, Grammar("json_schema", '{"type":"object"}', "response_format")),
        ({"json_object": False}, None),
        ({"json_schema": '{"type": "integer"}'}, Grammar("json_schema", '{"type": "integer"}', "response_format")),
        ({"grammar": 'start: "a"'}, Grammar("grammar", 'start: "a"', "grammar")),
    ],
)
async def test_formats(api: GrpcApi, model: EchoModel, fields: dict[str, Any], grammar: Grammar | None) -> None:
    await api.Generate(ask(prompt="a", **fields), Context())
    assert model.requests[0].grammar == grammar


ERRORS = [
    ({"prompt": "a", "temperature": 9}, INVALID, "temperature"),
    ({"prompt": "a", "logprobs": 21}, INVALID, "logprobs"),
    ({"prompt": "a", "logit_bias": {3: 101}}, INVALID, "logit_bias.3"),
    ({"prompt": "a", "n": 33}, INVALID, "n: this asks for 33 sequences"),
    ({"prompt": "a", "max_tokens": 1, "min_tokens": 2}, INVALID, "min_tokens"),
    ({"prompt": "a", "json_schema": "{"}, INVALID, "json_schema: not valid JSON"),
    ({"prompt": "a", "json_schema": '{"a": NaN}'}, INVALID, "json_schema: not valid JSON"),
    ({"prompt": "a", "json_schema": "[1]"}, INVALID, "json_schema: found a JSON list"),
    ({}, INVALID, "prompt: missing"),
    ({"prompt_tokens": pb.TokenIds()}, INVALID, "prompt"),
    ({"prompts": pb.Prompts()}, INVALID, "prompt"),
    ({"prompts": pb.Prompts(prompts=[pb.Prompt()])}, INVALID, "prompt"),
    ({"prompts": pb.Prompts(prompts=[pb.Prompt(text="a"), pb.Prompt(tokens=pb.TokenIds(ids=[1]))])}, INVALID, "prompt"),
    ({"chat": pb.Chat()}, INVALID, "messages"),
    ({"chat": pb.Chat(messages=[pb.ChatMessage(role="robot")])}, INVALID, "messages[0].role"),
    ({"chat": CHAT, "echo": True}, INVALID, "echo: found True, allowed are false"),
    ({"model": "gpt", "prompt": "a"}, grpc.StatusCode.NOT_FOUND, "served are"),
    ({"model": "absent", "prompt": "a"}, grpc.StatusCode.UNAVAILABLE, "no replica"),
]


@pytest.mark.parametrize(("fields", "code", "words"), ERRORS)
async def test_errors_become_canonical_codes(
    api: GrpcApi, fields: dict[str, Any], code: grpc.StatusCode, words: str
) -> None:
    context, stream_context = Context(x_request_id="mine"), Context()
    assert await api.Generate(ask(**fields), context) == pb.GenerateResponse()
    assert (context.code, context.trailing) == (code, {"x-request-id": "mine"})
    assert words in context.details
    assert await stream(api, ask(**fields), stream_context) == []
    assert (stream_context.code, stream_context.details) == (code, context.details)


async def test_a_stream_cannot_choose_the_best(api: GrpcApi) -> None:
    context = Context()
    await stream(api, ask(prompt="a", best_of=2), context)
    assert (context.code, "best_of" in context.details) == (INVALID, True)


@pytest.mark.parametrize(
    ("error", "code", "hints"),
    [
        (QueueFullError("full", 3), grpc.StatusCode.RESOURCE_EXHAUSTED, {"retry-after": "3"}),
        (DeadlineError("late"), grpc.StatusCode.DEADLINE_EXCEEDED, {}),
    ],
)
async def test_a_replica_s_errors(
    api: GrpcApi, model: EchoModel, error: NibbleError, code: grpc.StatusCode, hints: dict[str, str]
) -> None:
    model.error, model.error_at = error, 1
    context = Context()
    await api.Generate(ask(prompt="a b"), context)
    assert (context.code, context.details) == (code, str(error))
    assert context.trailing == {"x-request-id": context.trailing["x-request-id"], **hints}
    stream_context = Context()
    assert [message.choice.text for message in await stream(api, ask(prompt="a b"), stream_context)] == ["a "]
    assert stream_context.code == code


async def test_tokenize_and_detokenize(api: GrpcApi, model: EchoModel) -> None:
    answer = await api.Tokenize(pb.TokenizeRequest(model="echo", prompt="to be or"), Context())
    assert (list(answer.tokens), answer.max_model_len) == ([1, 2, 2, 2], model.config.context)
    plain = pb.TokenizeRequest(model="echo", prompt="to be or", add_special_tokens=False)
    assert list((await api.Tokenize(plain, Context())).tokens) == [2, 2, 2]
    assert list((await api.Tokenize(pb.TokenizeRequest(model="echo", chat=CHAT), Context())).tokens) == [1, 1, 1]
    assert (await api.Detokenize(pb.DetokenizeRequest(model="echo", tokens=[1, 3]), Context())).prompt == "x xxx"
    context = Context()
    await api.Tokenize(pb.TokenizeRequest(model="echo"), context)
    assert (context.code, context.details.startswith("prompt:")) == (INVALID, True)
    await api.Detokenize(pb.DetokenizeRequest(model="gpt"), missing := Context())
    assert missing.code == grpc.StatusCode.NOT_FOUND


async def test_embed(model: EchoModel) -> None:
    api = api_of(model, embeddings=2)
    ids = pb.Prompt(tokens=pb.TokenIds(ids=[7]))
    answer = await api.Embed(
        pb.EmbedRequest(model="echo", inputs=[pb.Prompt(text="a b"), pb.Prompt(text="c")]), Context()
    )
    assert [list(each.values) for each in answer.embeddings] == [[0.5, -1.0, 2.0], [0.5, -1.0, 1.0]]
    assert (answer.model, answer.prompt_tokens) == ("echo", 3)
    assert (await api.Embed(pb.EmbedRequest(model="echo", inputs=[ids]), Context())).prompt_tokens == 1
    for inputs, words in (([], "input"), ([ids] * 3, "up to 2"), ([pb.Prompt(text="unembeddable")], "no embeddings")):
        context = Context()
        await api.Embed(pb.EmbedRequest(model="echo", inputs=inputs), context)
        assert (context.code, words in context.details) == (INVALID, True)


async def test_list_models(api: GrpcApi) -> None:
    models = (await api.ListModels(pb.ListModelsRequest(), Context())).models
    assert [(model.id, model.context, model.ready) for model in models] == [("echo", 512, True), ("absent", 512, False)]


async def test_health_of_the_whole_and_of_a_model(api: GrpcApi) -> None:
    status = health_pb2.HealthCheckResponse

    async def check(service: str) -> int:
        return int((await api.Check(health_pb2.HealthCheckRequest(service=service), Context())).status)

    for service in ("", "nibble.v1.Inference", "inference.GRPCInferenceService"):
        assert await check(service) == status.NOT_SERVING
    assert await check("echo") == status.SERVING
    context = Context()
    await api.Check(health_pb2.HealthCheckRequest(service="nobody"), context)
    assert context.code == grpc.StatusCode.NOT_FOUND


async def test_watch_tells_the_status_at_once(api: GrpcApi) -> None:
    watch = api.Watch(health_pb2.HealthCheckRequest(service="nobody"), Context())
    assert (await anext(watch)).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    await watch.aclose()


async def test_health_of_everything_at_once(api: GrpcApi) -> None:
    answer = await api.List(health_pb2.HealthListRequest(), Context())
    status = health_pb2.HealthCheckResponse
    assert {name: each.status for name, each in answer.statuses.items()} == {
        "": status.NOT_SERVING,
        "nibble.v1.Inference": status.NOT_SERVING,
        "inference.GRPCInferenceService": status.NOT_SERVING,
        "echo": status.SERVING,
        "absent": status.NOT_SERVING,
    }


async def test_a_watch_ends_with_the_server(api: GrpcApi) -> None:
    """It would hold up the drain."""
    api.operations.router.draining = True
    found = await drained(api.Watch(health_pb2.HealthCheckRequest(service="echo"), context := Context()), context)
    assert [each.status for each in found] == [health_pb2.HealthCheckResponse.NOT_SERVING]


UNARY = ("Generate", "Tokenize", "Detokenize", "Embed", "ListModels", "Check", "List",
         "ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer",
         "ModelConfig", "ModelStatistics", "RepositoryIndex")  # fmt: skip


async def test_a_message_that_could_not_be_parsed_is_refused_by_each_method(api: GrpcApi) -> None:
    malformed = MalformedMessage("nibble.v1.Some")
    for method in UNARY:
        answer = await getattr(api, method)(malformed, context := Context())
        assert (context.code, context.details.partition(":")[0]) == (INVALID, "message"), method
        assert not answer.ListFields()
    for method in ("GenerateStream", "Watch"):
        assert await drained(getattr(api, method)(malformed, context := Context()), context) == []
        assert (context.code, context.details.partition(":")[0]) == (INVALID, "message"), method
    methods = pb.DESCRIPTOR.services_by_name["Inference"].methods
    kserve_methods = open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods
    health_methods = health_pb2.DESCRIPTOR.services_by_name["Health"].methods
    every = {method.name for method in (*methods, *kserve_methods, *health_methods)}
    assert every - {*UNARY, "GenerateStream", "Watch"} == {"ModelStreamInfer"}  # in test_kserve_api.py


async def test_a_request_without_room_in_the_router_is_told_when_to_come_again(api: GrpcApi, model: EchoModel) -> None:
    model.fill()
    contexts = [Context(), Context(), Context()]
    await api.Generate(ask(prompt="a"), contexts[0])
    await stream(api, ask(prompt="a"), contexts[1])
    await api.Embed(pb.EmbedRequest(model="echo", inputs=[pb.Prompt(text="a")]), contexts[2])
    assert [context.code for context in contexts] == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 3
    assert contexts[0].trailing["retry-after"] == "1"
    assert not model.requests


async def test_a_request_of_class_batch_gives_way(api: GrpcApi, model: EchoModel) -> None:
    model.fill()
    places = model.admission.queue._waiting()
    model.admission.queue.leave(places[0])
    waiting = asyncio.ensure_future(api.Generate(ask(prompt="a", priority=1), context := Context()))
    while len(model.admission.queue) < 64:
        await asyncio.sleep(0)
    model.admission.queue.enter(None, 1)
    await waiting
    assert context.code == grpc.StatusCode.RESOURCE_EXHAUSTED
