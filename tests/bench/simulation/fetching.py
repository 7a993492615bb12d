"""How an artifact's chunks come to many nodes at once: the durable store's bandwidth is bounded as a whole, a node's
link in each direction.

As `cluster/artifact_store.py` does it: the chunks are read from the durable copy into the object store of one node,
`TASKS_AT_ONCE` at a time; every node then gets them one at a time, beginning with one drawn at random, from a node that
has the chunk, drawn at random, and has it for others from then on. A node that sends to several does so in turns (Ray's
push_manager.cc). For comparison all may begin with the first chunk, and a node may read the durable copy by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from random import Random

from cluster.artifact_store import TASKS_AT_ONCE
from cluster.artifacts.manifest import SHARD_BYTES


class Link:
    """Bytes a second, which its transfers share equally; none gets more than `most`."""

    def __init__(self, rate: float, most: float | None = None) -> None:
        self._rate, self._most = rate, rate if most is None else most
        self._loop = asyncio.get_running_loop()
        self._left: dict[asyncio.Future[None], float] = {}
        self._at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self.sent = 0.0

    @property
    def transfers(self) -> int:
        return len(self._left)

    async def transfer(self, size: float) -> None:
        self._advance()
        done: asyncio.Future[None] = self._loop.create_future()
        self._left[done] = size
        self._schedule()
        await done

    def _each(self) -> float:
        return min(self._most, self._rate / len(self._left))

    def _advance(self) -> None:
        passed, self._at = self._loop.time() - self._at, self._loop.time()
        if passed > 0 and self._left:
            moved = passed * self._each()
            self.sent += moved * len(self._left)
            self._left = {each: left - moved for each, left in self._left.items()}

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for each in [each for each, left in self._left.items() if left <= 1.0]:
            del self._left[each]
            each.set_result(None)
        if self._left:
            self._timer = self._loop.call_later(min(self._left.values()) / self._each(), self._event)

    def _event(self) -> None:
        self._timer = None
        self._advance()
        self._schedule()


class ObjectStore:
    """One artifact's chunks, and which nodes have each. Bytes a second: `durable` of the durable store in all, `link`
    of a node. `in_order`: each node begins with the first chunk."""

    def __init__(self, size: int, durable: float, link: float, random: Random, in_order: bool = False) -> None:
        whole, rest = divmod(size, SHARD_BYTES)
        self.chunks = [SHARD_BYTES] * whole + ([rest] if rest else [])
        self.durable = Link(durable, link)
        self._link, self._random, self._in_order = link, random, in_order
        self._links: dict[int, Link] = {}  # upwards
        self._holders: list[list[int]] = [[] for _ in self.chunks]
        self._read: asyncio.Task[None] | None = None
        self.owner = 0

    async def fetch(self, node: int) -> None:
        """All chunks are at the node then."""
        if self._read is None:
            self._read = asyncio.ensure_future(self._from_durable())
        await asyncio.shield(self._read)  # an artifact is published once it is whole
        count = len(self.chunks)
        first = 0 if self._in_order else self._random.randrange(count)
        for index in (*range(first, count), *range(first)):
            holders = self._holders[index]
            if node in holders:
                continue
            source = self._random.choice(holders)
            await self._link_of(source).transfer(self.chunks[index])
            holders.append(node)

    async def fetch_alone(self, node: int) -> None:
        """From the durable copy, as if there were no object store."""
        for size in self.chunks:
            await self.durable.transfer(size)

    def _link_of(self, node: int) -> Link:
        return self._links.setdefault(node, Link(self._link))

    async def _from_durable(self) -> None:
        turns = asyncio.Semaphore(TASKS_AT_ONCE)

        async def read(index: int) -> None:
            async with turns:
                await self.durable.transfer(self.chunks[index])
            self._holders[index].append(self.owner)

        await asyncio.gather(*(read(index) for index in range(len(self.chunks))))


async def herd(store: ObjectStore, nodes: Sequence[int], alone: bool = False) -> list[float]:
    """Seconds until each of the nodes, which begin together, has the artifact."""
    loop = asyncio.get_running_loop()
    begun = loop.time()

    async def one(node: int) -> float:
        await (store.fetch_alone(node) if alone else store.fetch(node))
        return loop.time() - begun

    return list(await asyncio.gather(*map(one, nodes)))
