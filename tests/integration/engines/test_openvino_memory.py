"""The memory of the openvino engine: how large its KV cache is, and when memory is given back."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Iterator

import pytest

from cluster.errors import EngineError
from cluster.machine.isa import cpu_flags
from deployments.engines.base import TokenRequest
from deployments.engines.openvino import engine as openvino
from deployments.engines.openvino.batching.paged_cache import BLOCK_TOKENS
from deployments.engines.openvino.engine import OpenvinoEngine
from deployments.engines.openvino.paged_model import PagedModel
from deployments.engines.products.layout import wants_tiles
from tests.integration.engines.openvino_engines import (
    CONTEXT,
    GREEDY,
    PRECISE,
    Artifact,
    Load,
    fail,
    ids,
    llama_engines,
    prompt,
)


@pytest.fixture
def llama(demo_artifact: Artifact) -> Iterator[Load]:
    with llama_engines(demo_artifact) as load:
        yield load


@pytest.mark.parametrize(("cores", "blocks"), [(1, 40), (2, 20), (4, 10), (64, CONTEXT // BLOCK_TOKENS)])
def test_replicas_that_fit_on_a_node_share_a_quarter_of_its_memory(
    llama: Load, monkeypatch: pytest.MonkeyPatch, cores: int, blocks: int
) -> None:
    monkeypatch.setattr(PagedModel, "block_bytes", 1000)
    monkeypatch.setattr(openvino, "available_memory", lambda: 4 * 40 * 1000)
    monkeypatch.setattr(openvino, "available_cores", lambda: cores)
    assert llama(max_running=100).info()["kv_cache_tokens"] == blocks * BLOCK_TOKENS


def test_the_cache_is_sized_once_the_weights_are_packed(llama: Load, monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_an_engine_that_dropped_the_files_pages_computes_the_same(llama: Load) -> None:
    engine = llama()
    weights = engine._batch._model._weights
    first = await ids(engine, TokenRequest(prompt(1), 20, GREEDY))
    weights.unload()
    assert await ids(engine, TokenRequest(prompt(1), 20, GREEDY)) == first


@pytest.mark.skipif(
    not wants_tiles("throughput", cpu_flags()), reason="on this CPU OpenVINO multiplies, and packs the weights"
)
def test_mapped_weights_are_not_free_for_the_cache(llama: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel counts pages of files as available."""
    monkeypatch.setattr(PagedModel, "block_bytes", 1000)
    monkeypatch.setattr(PagedModel, "mapped_bytes", 10**6)
    monkeypatch.setattr(openvino, "available_memory", lambda: 10**6 + 4 * 40 * 1000)
    monkeypatch.setattr(openvino, "available_cores", lambda: 1)
    assert llama(max_running=100, tune="throughput").info()["kv_cache_tokens"] == 40 * BLOCK_TOKENS


async def test_an_idle_engine_gets_its_whole_cache_and_serves_meanwhile(llama: Load) -> None:
    engine = llama(kv_cache="512MB")
    first = await ids(engine, TokenRequest(prompt(1), 5, GREEDY))
    for _ in range(600):
        if engine.info()["kv_cache_populated"]:
            break
        await asyncio.sleep(0.1)
    assert engine.info()["kv_cache_populated"]
    assert await ids(engine, TokenRequest(prompt(1), 5, GREEDY)) == first


async def test_a_cache_that_is_too_small_for_all_loses_no_token(llama: Load) -> None:
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
