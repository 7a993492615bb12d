"""The openvino engine behind the Engine contract: many sequences at once, and each as if it were alone."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.config import DraftConfig, OpenvinoConfig
from cluster.errors import EngineError, InvalidRequestError
from cluster.families import FAMILY_NAMES, FamilyName
from cluster.isa import available_cores, cpu_flags
from deployments.engines.base import Token, TokenRequest
from deployments.engines.openvino import engine as openvino
from deployments.engines.openvino.draft_model import DraftModel
from deployments.engines.openvino.engine import OpenvinoEngine
from deployments.engines.openvino.paged_cache import BLOCK_TOKENS
from deployments.engines.openvino.paged_model import PagedModel
from deployments.engines.products.layout import wants_tiles
from deployments.engines.products.threads import THREAD_NAME
from deployments.records import SamplingParams
from tests.integration.slow_mask import SlowMask

Artifact = Callable[[FamilyName], Path]
CONTEXT, TOKENS = 256, 24
GREEDY = SamplingParams(temperature=0)
PRECISE = OpenvinoConfig(tune="precision")


def prompt(seed: int, length: int = 40) -> list[int]:
    return np.random.default_rng(seed).integers(3, 300, length).tolist()


async def collect(engine: OpenvinoEngine, request: TokenRequest) -> list[Token]:
    return [token async for batch in engine.generate(request) for token in batch]


async def ids(engine: OpenvinoEngine, request: TokenRequest) -> list[int]:
    return [token.id for token in await collect(engine, request)]


def fail(*_: object) -> None:
    """In the place of a model's step."""
    raise EngineError("OpenVINO failed")


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def engine(request: pytest.FixtureRequest, demo_artifact: Artifact) -> Iterator[OpenvinoEngine]:
    engine = OpenvinoEngine(demo_artifact(request.param), 1, CONTEXT, 8, PRECISE)
    yield engine
    engine.check_integrity()
    engine.close()


@pytest.fixture
def llama(demo_artifact: Artifact) -> Iterator[Callable[..., OpenvinoEngine]]:
    engines = []

    def load(max_running: int = 8, draft: FamilyName | None = None, **options: object) -> OpenvinoEngine:
        if draft:
            options["draft"] = {"checkpoint": f"builtin:{draft}"}
        config = OpenvinoConfig.model_validate({"tune": "precision", **options})
        folder = demo_artifact(draft) if draft else None
        engines.append(OpenvinoEngine(demo_artifact("llama"), 1, CONTEXT, max_running, config, draft=folder))
        return engines[-1]

    yield load
    for engine in engines:
        engine.check_integrity()
        engine.close()


async def test_sequences_together_get_the_tokens_that_each_gets_alone(engine: OpenvinoEngine) -> None:
    requests = [
        TokenRequest(prompt(i, 10 + 9 * i), TOKENS, GREEDY if i % 2 else SamplingParams(temperature=0.7, seed=i))
        for i in range(6)
    ]
    alone = [await ids(engine, request) for request in requests]
    before = engine.info()
    together = await asyncio.gather(*(ids(engine, request) for request in requests))
    # One in a hundred draws may fall on the other side of a rounding; whole sequences of others do not come by chance.
    same = [sum(a == b for a, b in zip(one, other, strict=False)) for one, other in zip(alone, together, strict=True)]
    assert sum(count == TOKENS for count in same) >= 5
    assert int(engine.info()["steps"]) - int(before["steps"]) < 3 * TOKENS  # not one after the other: 6 * TOKENS


@pytest.mark.parametrize("split", [1, 20])
async def test_an_engine_goes_on_behind_tokens_that_another_drew(engine: OpenvinoEngine, split: int) -> None:
    request = TokenRequest(prompt(14), 30, SamplingParams(temperature=0, repetition_penalty=1.2))
    whole = await collect(engine, request)
    rest = await collect(engine, replace(request, generated=[token.id for token in whole[:split]]))
    assert [token.id for token in rest] == [token.id for token in whole[split:]]
    assert rest[-1].finish_reason == whole[-1].finish_reason


async def test_generation_ends_at_an_end_token_at_max_tokens_and_where_the_context_is_full(
    engine: OpenvinoEngine,
) -> None:
    tokens = await collect(engine, TokenRequest(prompt(1), TOKENS, GREEDY))
    assert [token.finish_reason for token in tokens] == [None] * (TOKENS - 1) + ["length"]
    end = tokens[4].id
    first = [token.id for token in tokens].index(end)
    ended = await collect(engine, TokenRequest(prompt(1), TOKENS, GREEDY, eos_token_ids=frozenset({end})))
    assert (len(ended), ended[-1].id, ended[-1].finish_reason) == (first + 1, end, "stop")
    full = await collect(engine, TokenRequest(prompt(2, CONTEXT - 3), 50, GREEDY))
    assert (len(full), full[-1].finish_reason) == (3, "length")


async def test_scores_agree_with_what_generating_said_and_embeddings_tell_prompts_apart(engine: OpenvinoEngine) -> None:
    start = prompt(5)
    tokens = await collect(engine, TokenRequest(start, 8, GREEDY, logprobs=2))
    scored = await engine.score([*start, *(token.id for token in tokens)], 2)
    assert scored[0].logprob is None
    for said, score in zip(tokens, scored[len(start) :], strict=True):
        assert said.id == score.id == said.top[0][0]
        assert said.logprob == pytest.approx(score.logprob, abs=0.02)
    one, same, other = await asyncio.gather(engine.embed(start), engine.embed(start), engine.embed(prompt(6)))
    assert np.allclose(one, same, atol=0.02 * float(np.abs(one).max()))
    assert not np.allclose(one, other, atol=0.1)


async def test_a_prompt_that_began_like_an_earlier_one_is_taken_from_the_cache(engine: OpenvinoEngine) -> None:
    start = prompt(7, 3 * BLOCK_TOKENS)
    cold = await ids(engine, TokenRequest(start, 8, GREEDY))
    before = int(engine.info()["reused_tokens"])
    warm = await ids(engine, TokenRequest(start, 8, GREEDY))
    assert int(engine.info()["reused_tokens"]) - before == 2 * BLOCK_TOKENS
    assert warm == cold


@pytest.mark.parametrize(
    ("tokens", "max_tokens", "field"),
    [
        ([], 1, "prompt"),
        ([10**6], 1, "prompt"),
        ([-1], 1, "prompt"),
        ([5] * CONTEXT, 1, "prompt"),
        ([5], 0, "max_tokens"),
    ],
)
async def test_what_cannot_be_served_is_refused(
    engine: OpenvinoEngine, tokens: list[int], max_tokens: int, field: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        await ids(engine, TokenRequest(tokens, max_tokens))
    assert refused.value.field == field


async def test_closing_a_stream_stops_it_and_nothing_else(llama: Callable[..., OpenvinoEngine]) -> None:
    engine = llama()
    stream = engine.generate(TokenRequest(prompt(1), 200, GREEDY, mask=SlowMask()))
    await anext(stream)
    other = asyncio.create_task(ids(engine, TokenRequest(prompt(2), 60, GREEDY)))
    await stream.aclose()
    assert len(await other) == 60
    engine.check_integrity()
    info = engine.info()
    assert (info["cancelled"], info["requests"]) == (1, 2)
    assert int(info["generated_tokens"]) < 60 + 190


@pytest.mark.parametrize(("cores", "blocks"), [(1, 40), (2, 20), (4, 10), (64, CONTEXT // BLOCK_TOKENS)])
def test_replicas_that_fit_on_a_node_share_a_quarter_of_its_memory(
    llama: Callable[..., OpenvinoEngine], monkeypatch: pytest.MonkeyPatch, cores: int, blocks: int
) -> None:
    monkeypatch.setattr(PagedModel, "block_bytes", 1000)
    monkeypatch.setattr(openvino, "available_memory", lambda: 4 * 40 * 1000)
    monkeypatch.setattr(openvino, "available_cores", lambda: cores)
    assert llama(max_running=100).info()["kv_cache_tokens"] == blocks * BLOCK_TOKENS


def test_the_cache_is_sized_once_the_weights_are_packed(
    llama: Callable[..., OpenvinoEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    step, unload, allocate = PagedModel.step, PagedModel.unload_packed, PagedModel.allocate

    def recorded(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(self: PagedModel, *arguments: object) -> object:
            events.append((name, *arguments[:1]) if name == "allocate" else (name,))
            return function(self, *arguments)

        return call

    def available() -> int:
        events.append(("available",))
        return 1 << 30

    monkeypatch.setattr(openvino, "available_memory", available)
    monkeypatch.setattr(PagedModel, "step", recorded("step", step))
    monkeypatch.setattr(PagedModel, "unload_packed", recorded("unload", unload))
    monkeypatch.setattr(PagedModel, "allocate", recorded("allocate", allocate))
    blocks = int(llama().info()["kv_cache_tokens"]) // BLOCK_TOKENS
    small, *steps = events[:-3]
    assert small == ("allocate", 2)  # for the 64 tokens of the longest step
    assert set(steps) == {("step",)}
    assert events[-3:] == [("unload",), ("available",), ("allocate", blocks)]
    assert blocks > 2


async def test_an_engine_that_dropped_the_files_pages_computes_the_same(llama: Callable[..., OpenvinoEngine]) -> None:
    engine = llama()
    weights = engine._batch._model._weights
    first = await ids(engine, TokenRequest(prompt(1), 20, GREEDY))
    weights.unload()
    assert await ids(engine, TokenRequest(prompt(1), 20, GREEDY)) == first


@pytest.mark.skipif(
    not wants_tiles("throughput", cpu_flags()), reason="on this CPU OpenVINO multiplies, and packs the weights"
)
def test_mapped_weights_are_not_free_for_the_cache(
    llama: Callable[..., OpenvinoEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel counts pages of files as available."""
    monkeypatch.setattr(PagedModel, "block_bytes", 1000)
    monkeypatch.setattr(PagedModel, "mapped_bytes", 10**6)
    monkeypatch.setattr(openvino, "available_memory", lambda: 10**6 + 4 * 40 * 1000)
    monkeypatch.setattr(openvino, "available_cores", lambda: 1)
    assert llama(max_running=100, tune="throughput").info()["kv_cache_tokens"] == 40 * BLOCK_TOKENS


async def test_an_idle_engine_gets_its_whole_cache_and_serves_meanwhile(llama: Callable[..., OpenvinoEngine]) -> None:
    engine = llama(kv_cache="512MB")
    first = await ids(engine, TokenRequest(prompt(1), 5, GREEDY))
    for _ in range(600):
        if engine.info()["kv_cache_populated"]:
            break
        await asyncio.sleep(0.1)
    assert engine.info()["kv_cache_populated"]
    assert await ids(engine, TokenRequest(prompt(1), 5, GREEDY)) == first


async def test_more_sequences_than_may_run_wait_for_their_turn(llama: Callable[..., OpenvinoEngine]) -> None:
    engine = llama(max_running=2)
    results = await asyncio.gather(*(ids(engine, TokenRequest(prompt(i), 10, GREEDY)) for i in range(7)))
    assert [len(result) for result in results] == [10] * 7


async def test_a_cache_that_is_too_small_for_all_loses_no_token(llama: Callable[..., OpenvinoEngine]) -> None:
    requests = [TokenRequest(prompt(i, 30), 100, GREEDY) for i in range(4)]
    roomy = llama()
    expected = [await ids(roomy, request) for request in requests]
    tight = llama(kv_cache=roomy_bytes(roomy) * (CONTEXT // BLOCK_TOKENS + 1))
    found = await asyncio.gather(*(ids(tight, request) for request in requests))
    tight.check_integrity()
    assert [len(result) for result in found] == [100] * 4
    assert sum(a == b for a, b in zip(found, expected, strict=True)) >= 3


def roomy_bytes(engine: OpenvinoEngine) -> int:
    """Of one block of its cache."""
    return engine._batch._model.block_bytes


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=0.3, seed=3)])
async def test_guesses_change_nothing_but_the_number_of_steps(
    llama: Callable[..., OpenvinoEngine], sampling: SamplingParams
) -> None:
    request = TokenRequest([*prompt(3, 12)] * 3, 60, sampling)
    plain, guessing = llama(), llama(prompt_lookup=4)
    assert await ids(guessing, request) == await ids(plain, request)
    info = guessing.info()
    assert info["generated_tokens"] == 60
    assert int(info["guessed_tokens"]) >= int(info["accepted_tokens"]) > 0
    assert int(info["steps"]) == int(plain.info()["steps"]) - int(info["accepted_tokens"])


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=0.3, seed=3)])
@pytest.mark.parametrize("draft", ["llama", "gptneox"])
async def test_a_draft_model_changes_nothing_but_the_number_of_steps(
    llama: Callable[..., OpenvinoEngine], sampling: SamplingParams, draft: FamilyName
) -> None:
    request = TokenRequest(prompt(3, 100), 60, sampling)  # more than a step: the draft model catches up in two
    plain, guessing = llama(), llama(draft=draft)
    assert await ids(guessing, request) == await ids(plain, request)
    info = guessing.info()
    guessed, accepted = int(info["guessed_tokens"]), int(info["accepted_tokens"])
    assert int(info["steps"]) == int(plain.info()["steps"]) - accepted
    if draft == "llama" and sampling == GREEDY:  # it guesses for itself, four tokens at a time
        assert accepted == guessed > 40
    else:
        assert guessed > accepted


async def test_a_draft_model_guesses_for_many_and_its_blocks_come_back(llama: Callable[..., OpenvinoEngine]) -> None:
    requests = [TokenRequest(prompt(i, 10 + 9 * i), TOKENS, GREEDY) for i in range(6)]
    plain, guessing = llama(), llama(draft="llama")
    expected = await asyncio.gather(*(ids(plain, request) for request in requests))
    found = await asyncio.gather(*(ids(guessing, request) for request in requests))
    assert sum(a == b for a, b in zip(found, expected, strict=True)) >= 5
    assert int(guessing.info()["accepted_tokens"]) > TOKENS
    guesser = guessing._batch._scheduler._guesser
    assert isinstance(guesser, DraftModel)
    guesser.check_integrity()
    assert guesser._pool.free == guesser._pool.size


async def test_a_step_that_fails_fails_its_sequences_and_the_engine_goes_on(
    llama: Callable[..., OpenvinoEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llama()
    expected = await ids(engine, TokenRequest(prompt(4), 5, GREEDY))

    with monkeypatch.context() as patch:
        patch.setattr(PagedModel, "step", fail)
        with pytest.raises(EngineError, match="OpenVINO failed"):
            await ids(engine, TokenRequest(prompt(4), 5, GREEDY))
    assert await ids(engine, TokenRequest(prompt(4), 5, GREEDY)) == expected


async def test_closing_frees_the_memory_at_once_also_after_a_step_that_failed(
    demo_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = OpenvinoEngine(demo_artifact("llama"), 1, CONTEXT, 2, PRECISE)
    cache = weakref.ref(engine._batch._model._memory[0])
    request = weakref.ref(engine._batch._model._request)
    monkeypatch.setattr(PagedModel, "step", fail)
    with pytest.raises(EngineError, match="OpenVINO failed") as error:
        await ids(engine, TokenRequest(prompt(4), 5, GREEDY))
    engine.close()
    assert cache() is None
    assert request() is None
    assert error.traceback  # it holds the model, as a log might


async def test_a_mask_that_fails_fails_its_own_sequence_alone(llama: Callable[..., OpenvinoEngine]) -> None:
    class Failing:
        def apply(self, logits: object) -> None:
            raise ValueError("no token is allowed")

        def accept(self, token: int) -> None: ...

    engine = llama()
    other = asyncio.create_task(ids(engine, TokenRequest(prompt(1), 20, GREEDY)))
    with pytest.raises(ValueError, match="no token is allowed"):
        await ids(engine, TokenRequest(prompt(2), 20, GREEDY, mask=Failing()))
    assert len(await other) == 20


async def test_closing_the_engine_ends_what_runs_and_what_comes_later(demo_artifact: Artifact) -> None:
    engine = OpenvinoEngine(demo_artifact("llama"), 1, CONTEXT, 2, PRECISE)
    streams = [
        asyncio.create_task(ids(engine, TokenRequest(prompt(i), 200, GREEDY, mask=SlowMask()))) for i in range(4)
    ]
    await asyncio.sleep(0.05)
    await asyncio.to_thread(engine.close)
    for stream in streams:
        with pytest.raises(EngineError, match="closed"):
            await stream
    with pytest.raises(EngineError, match="closed"):
        await engine.score(prompt(1), 1)
    engine.close()


@pytest.mark.skipif(
    not wants_tiles("throughput", cpu_flags()),
    reason="on this CPU OpenVINO multiplies, and nibble has no threads for it",
)
async def test_nibbles_own_products_give_tokens_and_end_with_the_engine(demo_artifact: Artifact) -> None:
    engine = OpenvinoEngine(demo_artifact("llama"), threads := min(2, available_cores()), CONTEXT, 2, OpenvinoConfig())
    assert engine.info()["products"] == "nibble"
    assert sum(thread.name == THREAD_NAME for thread in threading.enumerate()) == threads - 1
    request = TokenRequest(prompt(1), 20, GREEDY)
    assert await ids(engine, request) == await ids(engine, request)
    await asyncio.to_thread(engine.close)
    gc.collect()
    assert not any(thread.name == THREAD_NAME for thread in threading.enumerate())


def test_what_cannot_be_loaded_is_refused(demo_artifact: Artifact) -> None:
    with pytest.raises(EngineError, match=r"openvino.kv_cache: found 1000 bytes, allowed are \d+ and more"):
        OpenvinoEngine(demo_artifact("llama"), 1, CONTEXT, 2, OpenvinoConfig(tune="precision", kv_cache=1000))
    with pytest.raises(EngineError, match="context: found 513, allowed for this model is 1 to 512"):
        OpenvinoEngine(demo_artifact("starcoder"), 1, 513, 2, PRECISE)
    options = OpenvinoConfig(tune="precision", draft=DraftConfig(checkpoint="builtin:starcoder"))
    with pytest.raises(EngineError, match="context: found 513, allowed for its draft model is 1 to 512"):
        OpenvinoEngine(demo_artifact("llama"), 1, 513, 2, options, draft=demo_artifact("starcoder"))
    with pytest.raises(EngineError, match="threads: found 0"):
        OpenvinoEngine(demo_artifact("llama"), 0, CONTEXT, 2, PRECISE)


def test_its_threads_stay_on_its_cores_and_need_neither_torch_nor_ray(demo_artifact: Artifact) -> None:
    program = f"""
import asyncio, os, sys
from dataclasses import replace
from pathlib import Path
from cluster.config import OpenvinoConfig
from deployments.engines.base import TokenRequest
from deployments.engines.openvino.engine import OpenvinoEngine
core = max(os.sched_getaffinity(0))
before = set(os.listdir("/proc/self/task"))
engine = OpenvinoEngine(Path({str(demo_artifact("bloom"))!r}), 1, 64, 2, OpenvinoConfig(), cores=[core])
async def run():
    return [token async for batch in engine.generate(TokenRequest([5, 6], 4)) for token in batch]
assert len(asyncio.run(run())) == 4
started = set(os.listdir("/proc/self/task")) - before
assert started and all(os.sched_getaffinity(int(thread)) == {{core}} for thread in started), started
assert not {{"torch", "ray", "transformers"}} & set(sys.modules)
engine.close()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
