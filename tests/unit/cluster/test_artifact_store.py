"""What the artifact store asks of nodes, the durable copy and conversions. Without Ray: its tasks are coroutines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import NodeDiedError, RayTaskError

from cluster import artifact_store
from cluster.artifact_store import TASKS_AT_ONCE, ArtifactStore, Published
from cluster.artifacts.manifest import ChunkEntry, Manifest
from cluster.config import ArtifactsConfig
from cluster.conversion.wanted import Wanted
from cluster.errors import ArtifactError

CHUNKS = 20
WANTED = Wanted(source="org/model", family="llama", quantization="q4_0", artifact_id="a1")
MANIFEST = Manifest(
    artifact_id="a1",
    converter_version=1,
    family="llama",
    quantization="q4_0",
    engines=("bigdl",),
    source="org/model",
    binary="model.bin",
    bytes=CHUNKS,
    sha256="",
    chunks=tuple(ChunkEntry(offset=index, bytes=1, sha256="") for index in range(CHUNKS)),
    tensors=(),
    files={},
)
NOTHING_LEFT = ArtifactError("planned a conversion")


class FakeTask:
    """A Ray task: `remote` begins it at once, as Ray would with workers enough."""

    def __init__(self, run: Callable[..., Coroutine[Any, Any, Any]], node: str = "anywhere") -> None:
        self.run, self.node = run, node

    def remote(self, *arguments: Any) -> Any:
        return asyncio.ensure_future(self.run(self.node, *arguments))


class FakeChunkTask(FakeTask):
    def remote(self, *arguments: Any) -> Any:
        return f"{self.node} {arguments[-1]}", super().remote(*arguments)


class Places:
    """The nodes that hold the artifact, and whether the durable copy does. Counts the chunks being read."""

    def __init__(self) -> None:
        self.alive = ["n1", "n2"]
        self.holders = {"n1"}
        self.durable: bool = False
        self.dies_at: dict[str, int] = {}  # node -> chunk
        self.read: list[str] = []
        self.reading = self.most_at_once = 0
        self.kept = 0

    async def find_cached(self, node: str, config: ArtifactsConfig, wanted: Wanted) -> Manifest | None:
        if node in self.dies_at and node not in self.holders:
            raise NodeDiedError("gone")
        return MANIFEST if node in self.holders else None

    async def chunk(self, node: str, place: Any, manifest: Manifest, index: int) -> ChunkEntry:
        self.reading += 1
        self.most_at_once = max(self.most_at_once, self.reading)
        try:
            for _ in range(3):
                await asyncio.sleep(0)
        finally:
            self.reading -= 1
        self.read.append(f"{node} {index}")
        if self.dies_at.get(node) == index:
            self.holders.discard(node)
            raise NodeDiedError("gone")
        return manifest.chunks[index]

    async def files(self, node: str, *_: Any) -> dict[str, bytes]:
        return {}

    async def find_durable(self, node: str, uri: str, wanted: Wanted) -> Manifest | None:
        return MANIFEST if self.durable else None

    async def has_durable(self, node: str, uri: str, manifest: Manifest) -> bool:
        return self.durable

    async def keep_durable(self, node: str, uri: str, manifest: Manifest, files: Any, chunks: list[Any]) -> None:
        assert len(chunks) == CHUNKS
        self.durable, self.kept = True, self.kept + 1

    async def remove_durable(self, node: str, uri: str, artifact_id: str) -> None:
        self.durable = False

    async def plan(self, node: str, *_: Any) -> None:
        raise RayTaskError("plan_task", "", NOTHING_LEFT)


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Places:
    places = Places()
    tasks = {
        "find_cached": FakeTask(places.find_cached),
        "cached_chunk": FakeChunkTask(places.chunk),
        "cached_files": FakeTask(places.files),
        "find_durable": FakeTask(places.find_durable),
        "has_durable": FakeTask(places.has_durable),
        "keep_durable": FakeTask(places.keep_durable),
        "remove_durable": FakeTask(places.remove_durable),
        "durable_chunk": FakeChunkTask(places.chunk, "durable"),
        "durable_files": FakeTask(places.files),
        "plan_task": FakeTask(places.plan),
    }
    for name, task in tasks.items():
        monkeypatch.setattr(artifact_store, name, task)
    monkeypatch.setattr(artifact_store, "on_node", lambda task, node: type(task)(task.run, node))
    monkeypatch.setattr(artifact_store, "alive_nodes", lambda: places.alive)
    return places


def config(durable: bool = False) -> ArtifactsConfig:
    return ArtifactsConfig(cache_dir=Path("/nowhere"), durable_uri="memory://kept" if durable else None)


def ensure(store: ArtifactStore, with_chunks: bool = False, durable: bool = False, times: int = 1) -> list[Published]:
    async def run() -> list[Published]:
        return await asyncio.gather(*(store.ensure(WANTED, config(durable), with_chunks) for _ in range(times)))

    return asyncio.run(run())


def test_what_a_node_holds_is_not_read(places: Places) -> None:
    store = ArtifactStore()
    (published,) = ensure(store)
    assert (published.manifest, published.chunks) == (MANIFEST, None)
    assert places.read == []
    assert store.manifests() == [MANIFEST]
    store.forget("a1")
    assert store.manifests() == []


def test_chunks_are_read_a_few_at_a_time_and_once_for_all_who_ask(places: Places) -> None:
    store = ArtifactStore()
    answers = ensure(store, with_chunks=True, times=5)
    assert {tuple(answer.chunks or ()) for answer in answers} == {tuple(f"n1 {index}" for index in range(CHUNKS))}
    assert len(places.read) == CHUNKS
    assert store.counters()["reads"] == {"node_cache": 1, "durable": 0}
    assert places.most_at_once == TASKS_AT_ONCE


def test_a_node_that_dies_while_it_is_read_is_replaced_by_another(places: Places) -> None:
    places.holders, places.dies_at = {"n1", "n2"}, {"n1": 7}
    for answer in ensure(ArtifactStore(), with_chunks=True, times=2):
        assert answer.chunks == [f"n2 {index}" for index in range(CHUNKS)]
    assert "n1 19" not in places.read  # what had not begun was not begun any more


def test_the_durable_copy_is_read_where_no_node_is_left(places: Places) -> None:
    places.dies_at, places.durable = {"n1": 7}, True
    store = ArtifactStore()
    (answer,) = ensure(store, with_chunks=True, durable=True)
    assert store.counters()["reads"] == {"node_cache": 0, "durable": 1}, "what broke off is not counted"
    assert answer.chunks == [f"durable {index}" for index in range(CHUNKS)]
    assert places.most_at_once == TASKS_AT_ONCE
    assert places.kept == 0


def test_a_durable_copy_is_not_read_where_a_node_has_the_artifact(places: Places) -> None:
    places.durable = True
    (answer,) = ensure(ArtifactStore(), durable=True)
    assert (answer.chunks, places.read, places.kept) == (None, [], 0)


def test_a_durable_copy_that_is_missing_is_written_from_a_node(places: Places) -> None:
    store = ArtifactStore()
    (answer,) = ensure(store, durable=True)
    assert answer.chunks == [f"n1 {index}" for index in range(CHUNKS)]
    ensure(store, durable=True)
    assert places.kept == 1


def test_where_nobody_has_it_it_is_planned(places: Places) -> None:
    places.holders = set()
    with pytest.raises(ArtifactError, match="planned a conversion"):
        ensure(ArtifactStore())


def test_who_takes_an_artifact_is_counted() -> None:
    store = ArtifactStore()
    for source in ("node_cache", "object_store", "node_cache"):
        store.fetched(source)
    assert store.counters()["fetches"] == {"node_cache": 2, "object_store": 1}
