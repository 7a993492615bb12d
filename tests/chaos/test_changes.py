"""Everything that an operator changes on a running server, under constant load over HTTP and gRPC: no request fails,
and no stream is cut."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cluster.checkpoints.sources import DEMOS
from cluster.ray_cluster import free_ports
from tests.chaos.load import Client, Counts, Load, Protocol
from tests.chaos.table import Table
from tests.chaos.waiting import until
from tests.integration.processes import NIBBLE, ROOT, Served, replicas, sandbox, serving

pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]

TOKENS = 150
PROTOCOLS: tuple[Protocol, ...] = ("http", "grpc")


def configuration(checkpoint: Path, **changes: Any) -> dict[str, Any]:
    models = [
        {"name": "kept", "family": "llama", "checkpoint": "builtin:llama", "threads": 1},
        {"name": "changed", "family": "bloom", "checkpoint": str(checkpoint), "threads": 1},
    ]
    return {"router": {"replicas": 2}, "models": models, **changes}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of the model that changes: a folder of its own."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(DEMOS / "bloom", folder)
    return folder


@pytest.fixture
def served(checkpoint: Path) -> Iterator[Served]:
    http_port, grpc_port = free_ports(2)
    with sandbox() as home:
        config = yaml.safe_dump(configuration(checkpoint))
        with serving(home, config, http_port, grpc_port) as server:
            yield server
        assert home.wait_no_processes() == []


async def applied(served: Served, config: dict[str, Any]) -> str:
    ports = {"http": {"port": int(served.http.rsplit(":", 1)[1])}, "grpc": {"port": int(served.grpc.rsplit(":", 1)[1])}}
    path = served.sandbox.home / "new.yaml"
    path.write_text(yaml.safe_dump({**ports, **config}))
    process = await asyncio.create_subprocess_exec(
        *NIBBLE, "apply", str(path), env=served.sandbox.environment, cwd=ROOT,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await asyncio.wait_for(process.communicate(), 600)
    assert process.returncode == 0, output.decode()
    return output.decode()


async def test_no_request_fails_whatever_is_changed(served: Served, checkpoint: Path) -> None:
    table = Table()
    protocols: tuple[Any, ...] = ("http", "grpc")
    models = ("kept", "changed")
    clients = [Client(served.http, served.grpc, m, p, TOKENS, 0.05) for m in models for p in protocols]
    config = configuration(checkpoint)
    pids = {model: replicas(served.sandbox, model) for model in models}

    async with Load(clients).running() as load:

        async def step(what: str, done: Callable[[], Any]) -> None:
            load.take()
            await load.more(2)
            result = done()
            if asyncio.iscoroutine(result):
                await result
            await load.more(4)
            for model, (counts, gap) in load.take().items():
                table.row(f"{what}: {model}", counts, gap)
                assert counts.bad == 0, f"{what}: {model}: {counts}"

        config["limits"] = {"max_tokens": 400}
        await step("limits changed", lambda: applied(served, config))
        added = {"name": "added", "family": "starcoder", "checkpoint": "builtin:starcoder", "threads": 1}
        config["models"] = [*config["models"], added]
        await step("model added", lambda: applied(served, config))
        change(config, "changed", queue={"max_queued": 32})
        await step("queue changed", lambda: applied(served, config))
        assert {model: replicas(served.sandbox, model) for model in models} == pids, "nothing was restarted so far"

        load.forget("changed")
        other_weights(checkpoint)
        await step("checkpoint's content changed", lambda: applied(served, config))
        assert replicas(served.sandbox, "kept") == pids["kept"]
        assert replicas(served.sandbox, "changed") != pids["changed"]

        config["models"] = config["models"][:2]
        await step("model removed", lambda: applied(served, config))

        async def second() -> None:
            await applied(served, config)
            await until(lambda: pids["kept"] < replicas(served.sandbox, "kept"), 180)  # the first one goes on

        change(config, "kept", replicas={"min": 2, "max": 2})
        await step("two replicas instead of one", second)
        change(config, "kept", replicas={"min": 1, "max": 1})
        await step("one replica instead of two", lambda: applied(served, config))


def change(config: dict[str, Any], name: str, **fields: Any) -> None:
    config["models"] = [{**model, **fields} if model["name"] == name else model for model in config["models"]]


def other_weights(checkpoint: Path) -> None:
    """One byte of the weights, at their end."""
    weights = next(checkpoint.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


async def test_a_removed_model_ends_what_it_has(served: Served, checkpoint: Path) -> None:
    """More requests than its replica takes at once: those that wait for their turn get it, and nothing new comes."""
    clients = [Client(served.http, served.grpc, "changed", p, TOKENS) for p in PROTOCOLS * 4]
    (expected,) = {(await client.ask(None)).text for client in clients[:1]}
    under_way = [asyncio.create_task(client.ask(expected)) for client in clients]
    await asyncio.sleep(0.5)
    config = configuration(checkpoint)
    config["models"] = config["models"][:1]
    await applied(served, config)
    counts = Counts()
    for outcome in await asyncio.gather(*under_way):
        counts.add(outcome)
    Table().row("model removed: its own requests", counts, 0)
    assert counts.bad == 0, counts
    refused = await clients[0].ask(None)
    assert refused.detail.startswith("404"), refused


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[tuple[Served, Path, str]]:
    """With a keys' file, and one of its keys."""
    keys = tmp_path / "keys.yaml"
    with sandbox() as home:
        key = home.run("keys", "add", str(keys), "kept").stdout.strip()
        config = {"models": [{"name": "kept", "family": "llama", "checkpoint": "builtin:llama", "threads": 1}]}
        config |= {"router": {"replicas": 2}, "auth": {"api_keys_file": str(keys)}}  # type: ignore[dict-item]
        with serving(home, yaml.safe_dump(config), *free_ports(2)) as server:
            yield server, keys, key
        assert home.wait_no_processes() == []


async def test_the_keys_file_is_changed_and_replaced(guarded: tuple[Served, Path, str], tmp_path: Path) -> None:
    served, keys, key = guarded
    run = served.sandbox.run
    other = tmp_path / "other.yaml"

    def client(key: str) -> Client:
        return Client(served.http, served.grpc, "kept", "http", 1, key=key)

    async def seen_by_both(key: str, refused: bool) -> None:
        """Both routers see it so: several times in a row."""
        seen, deadline = 0, time.monotonic() + 60
        while seen < 8:
            assert time.monotonic() < deadline
            outcome = await client(key).ask(None)
            seen = seen + 1 if outcome.detail.startswith("401") == refused else 0

    clients = [Client(served.http, served.grpc, "kept", protocol, TOKENS, 0.05, key) for protocol in PROTOCOLS]
    async with Load(clients).running() as load:
        await load.more(2)
        load.take()
        added = (await asyncio.to_thread(run, "keys", "add", str(keys), "added")).stdout.strip()
        await seen_by_both(added, refused=False)
        await asyncio.to_thread(run, "keys", "remove", str(keys), "added")
        await seen_by_both(added, refused=True)
        whole = keys.read_text()
        keys.write_text(whole[: len(whole) // 2])  # as an editor may write it
        await load.more(4)
        other.write_text(whole)
        other.replace(keys)
        await load.more(4)
        for _, (counts, gap) in load.take().items():
            Table().row("keys' file changed, broken, replaced", counts, gap)
            assert counts.bad == 0, counts


def answering_routers(served: Served) -> set[str]:
    metrics = httpx.get(f"{served.http}/metrics", timeout=30, trust_env=False).text
    return set(re.findall(r'^nibble_build_info\{[^}]*router="([^"]+)"', metrics, re.MULTILINE))


async def test_a_router_that_is_killed_is_not_missed(served: Served) -> None:
    """One of two: what was in it is lost with its connections, and clients are told; all else goes on."""
    clients = [Client(served.http, served.grpc, "kept", protocol, TOKENS, 0.05) for protocol in ("http", "grpc")]  # type: ignore[arg-type]
    async with Load(clients).running() as load:
        await until(lambda: len(answering_routers(served)) == 2, 180)  # `nibble serve` waits for one
        await load.more(2)
        load.take()
        os.kill(min(replicas(served.sandbox, "router")), signal.SIGKILL)
        await load.more(10)
        ((counts, gap),) = load.take().values()
        Table().row("a router replica killed", counts, gap)
        assert counts.wrong == 0
        assert counts.bad <= len(clients), "no more than were in it"
