"""How an artifact comes to many nodes: links are shared equally, and every node has every chunk at the end."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from cluster.artifacts.manifest import SHARD_BYTES
from tests.bench.simulation import virtual_time
from tests.bench.simulation.fetching import Link, ObjectStore, herd


def test_a_link_is_shared_equally_and_carries_no_more_than_its_rate() -> None:
    async def main() -> list[float]:
        link, loop = Link(100.0), asyncio.get_running_loop()
        ends = []

        async def one(at: float, size: float) -> None:
            await asyncio.sleep(at)
            await link.transfer(size)
            ends.append(loop.time())

        await asyncio.gather(one(0, 1000), one(0, 500), one(5, 250))
        assert link.sent == pytest.approx(1750)
        assert link.transfers == 0
        return ends

    # 50 each until 5 s; then a third each, the first 250 left of the second and the third end together at 12.5 s.
    assert virtual_time.run(main) == pytest.approx([12.5, 12.5, 17.5], abs=0.1)


def test_one_node_reads_the_durable_copy_and_the_others_get_it_from_each_other() -> None:
    size = 2 * SHARD_BYTES + 1000

    async def main(nodes: int, in_order: bool = False) -> tuple[list[float], float]:
        store = ObjectStore(size, durable=SHARD_BYTES, link=SHARD_BYTES, random=Random(1), in_order=in_order)
        assert sum(store.chunks) == size
        return await herd(store, range(1, 1 + nodes)), store.durable.sent

    (one,), sent = virtual_time.run(lambda: main(1))
    assert one == pytest.approx(2 + 2, abs=0.1)
    assert sent == pytest.approx(size)
    many, sent = virtual_time.run(lambda: main(10, in_order=True))
    assert sent == pytest.approx(size), "the durable copy is read once"
    # In step: each chunk is at one node alone when all of them ask for it.
    assert many == pytest.approx([2 + 10 * 2] * 10, abs=0.1)
    spread, sent = virtual_time.run(lambda: main(10))
    assert sent == pytest.approx(size)
    assert 2 + 2 < max(spread) < max(many) - 2


def test_nodes_that_read_the_durable_copy_by_themselves_share_its_bandwidth() -> None:
    async def main() -> list[float]:
        store = ObjectStore(2 * SHARD_BYTES, durable=SHARD_BYTES, link=SHARD_BYTES, random=Random(1))
        return await herd(store, range(10), alone=True)

    assert virtual_time.run(main) == pytest.approx([20.0] * 10, abs=0.1)
