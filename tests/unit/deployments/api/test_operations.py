"""What every operation keeps to, whichever API asks: deadlines, limits, usage."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.config import AuthConfig, LimitsConfig, LoggingConfig
from cluster.errors import InvalidRequestError, ModelNotFoundError, UnavailableError
from deployments.api.access import Access, hash_of
from deployments.api.calls import Call, Calls
from deployments.api.operations import Operations
from deployments.api.requests.schema import CompletionRequest, DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from deployments.records import Conversation
from deployments.routing.admission import QueuePlace
from deployments.routing.model_admission import Caller
from deployments.routing.router import Router
from tests.unit.fakes import EchoModel


class TimedModel(EchoModel):
    """Notes the time that each request has left, and takes `seconds` of it."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.seconds = seconds
        self.left: list[float | None] = []

    async def tokenize(self, text: str | Conversation, add_special_tokens: bool, timeout_s: float | None) -> list[int]:
        self.left.append(timeout_s)
        return await super().tokenize(text, add_special_tokens, timeout_s)

    async def detokenize(self, ids: Sequence[int], timeout_s: float | None) -> str:
        self.left.append(timeout_s)
        return await super().detokenize(ids, timeout_s)

    async def embed(
        self, prompt: str | tuple[int, ...], max_tokens: int | None, timeout_s: float | None
    ) -> tuple[list[float], int]:
        self.left.append(timeout_s)
        await asyncio.sleep(self.seconds)
        return await super().embed(prompt, max_tokens, timeout_s)


def operations_of(model: EchoModel, **limits: Any) -> tuple[Operations, Call]:
    router = Router({"echo": model, "absent": EchoModel("absent", ready=False)}, LimitsConfig(**limits))
    operations = Operations(router, Calls(Access(AuthConfig()), LoggingConfig()))
    return operations, operations.calls.begin("http", "POST /", None)


async def test_each_operation_hands_the_deadline_on() -> None:
    model = TimedModel()
    operations, call = operations_of(model, timeout_s=7)
    await operations.tokenize(call, TokenizeRequest(model="echo", prompt="a b"))
    await operations.detokenize(call, DetokenizeRequest(model="echo", tokens=[1]))
    await operations.generate(call, CompletionRequest(model="echo", prompt="a b"), "id")
    assert model.left == [7, 7]
    assert [request.timeout_s for request in model.requests] == [7]


async def test_the_inputs_of_one_request_share_its_deadline() -> None:
    model = TimedModel(seconds=0.01)
    operations, call = operations_of(model, timeout_s=7)
    vectors, tokens = await operations.embed(call, EmbeddingRequest(model="echo", input=["a b", "c", "d"]))
    left = [each for each in model.left if each is not None]
    assert left == sorted(left, reverse=True)
    assert 7 >= left[0] > left[2] > 0
    assert (len(vectors), tokens, call.prompt_tokens) == (3, 4, 4)


async def test_without_a_limit_there_is_no_deadline() -> None:
    model = TimedModel()
    operations, call = operations_of(model, timeout_s=None)
    await operations.embed(call, EmbeddingRequest(model="echo", input="a"))
    await operations.tokenize(call, TokenizeRequest(model="echo", prompt="a b"))
    assert model.left == [None, None]


async def test_refused_before_a_replica_is_asked() -> None:
    model = EchoModel()
    operations, call = operations_of(model, embeddings=2)
    with pytest.raises(InvalidRequestError, match="input: found 3, allowed are up to 2"):
        await operations.embed(call, EmbeddingRequest(model="echo", input=["a", "b", "c"]))
    with pytest.raises(ModelNotFoundError):
        await operations.generate(call, CompletionRequest(model="other", prompt="a"), "id")
    with pytest.raises(UnavailableError):
        await operations.generate(call, CompletionRequest(model="absent", prompt="a"), "id")
    assert not model.requests
    assert call.model == "absent"


async def test_usage_counts_each_prompt_once_and_what_a_client_that_leaves_has_taken() -> None:
    model = EchoModel()
    operations, call = operations_of(model)
    await operations.generate(call, CompletionRequest(model="echo", prompt=["a b", "c"], n=2), "id")
    assert (call.prompt_tokens, call.completion_tokens) == (3, 6)

    operations, call = operations_of(model)
    generation = operations.begin(call, CompletionRequest(model="echo", prompt="a b c d", stream=True), "id")
    assert await generation.first_came(10)
    assert (await anext(generation)).chunk.text == "a "
    assert (await anext(generation)).chunk.text == "b "
    assert not generation.complete
    await generation.aclose()
    assert (call.prompt_tokens, call.completion_tokens) == (4, 2)


async def test_the_first_chunk_is_waited_for_in_steps() -> None:
    model = EchoModel()
    model.delay_s = 0.05
    operations, call = operations_of(model)
    generation = operations.begin(call, CompletionRequest(model="echo", prompt="a b", stream=True), "id")
    assert not await generation.first_came(0.001)
    while not await generation.first_came(0.01):
        pass
    assert [item.chunk.text async for item in generation] == ["a ", "b "]
    assert generation.complete
    await generation.aclose()

    generation = operations.begin(call, CompletionRequest(model="echo", prompt="a b", stream=True), "id")
    assert not await generation.first_came(0.001)
    await generation.aclose()
    assert model.closed == 2


async def test_the_admission_knows_the_key_and_the_class_of_each_request(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"- {{name: alice, sha256: {hash_of('nbl-secret')}}}\n")
    model = EchoModel()
    operations = Operations(Router({"echo": model}), Calls(Access(AuthConfig(api_keys_file=keys)), LoggingConfig()))
    call = operations.calls.begin("http", "POST /", None)
    call.admit("nbl-secret")
    callers = []

    async def noted(caller: Caller, work: int, *further: Any, **named: Any) -> QueuePlace:
        callers.append((caller, work))
        return model.admission.queue.enter(caller.key, work)

    model.admission.admit = noted  # type: ignore[method-assign]
    await operations.generate(call, CompletionRequest(model="echo", prompt="a b", max_tokens=5), "id")
    await operations.generate(call, CompletionRequest(model="echo", prompt=[[7], [8, 9]], priority=3), "id")
    await operations.embed(call, EmbeddingRequest(model="echo", input=[[1, 2, 3], [4]]))
    alice, batch = Caller("alice"), Caller("alice", batch=True)
    # A word and 5 tokens; then with the 2 tokens that the first one took.
    assert callers == [(alice, 6), (batch, 3), (batch, 4), (alice, 4)]
    assert model.admission.queue.running == 0


@pytest.mark.parametrize(
    ("header", "fields", "session"),
    [
        (None, {}, None),
        (None, {"user": ""}, None),
        (None, {"user": "u"}, "alice/u"),
        (None, {"user": "u", "prompt_cache_key": "c"}, "alice/c"),
        ("h", {"user": "u", "prompt_cache_key": "c"}, "alice/h"),
        ("h" * 1000, {}, "alice/" + "h" * 128),
    ],
)
async def test_a_session_is_named_by_the_header_or_a_field_and_belongs_to_the_key(
    header: str | None, fields: dict[str, str], session: str | None
) -> None:
    model = EchoModel()
    operations, call = operations_of(model)
    call.key, call.session = "alice", header
    await operations.generate(call, CompletionRequest(model="echo", prompt=["a", "b"], **fields), "id")
    assert [request.session for request in model.requests] == [session] * 2
