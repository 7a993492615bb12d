"""Runs nibble's public commands as a user would: as processes, with a home and a Ray folder of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.ray_titles import replica_of

NIBBLE = (sys.executable, "-m", "cluster.cli")
ROOT = Path(__file__).parent.parent.parent
# In a user namespace, where this user has another id; its files stay its own.
NAMELESS = ("unshare", "--user", "--map-user=54321", "--map-group=54321")
OF_A_USER = ("HOME", "USER", "LOGNAME", "USERNAME", "XDG_CACHE_HOME", "HF_HOME")


@dataclass
class Sandbox:
    """A home folder (node cache, Ray's token) and a Ray folder with a path short enough for its sockets.

    `nameless`: the commands run as a user that has no name and no home, and HOME is not set."""

    home: Path
    ray_tmpdir: Path
    extra: dict[str, str] = field(default_factory=dict)
    nameless: bool = False

    @property
    def nibble(self) -> tuple[str, ...]:
        return (*NAMELESS, *NIBBLE) if self.nameless else NIBBLE

    @property
    def environment(self) -> dict[str, str]:
        own = {"HOME": str(self.home), "RAY_TMPDIR": str(self.ray_tmpdir), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        # Without what Ray has set in this process, where a test has a node of its own here.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        every = {**inherited, **own, **self.extra}
        return {name: value for name, value in every.items() if not (self.nameless and name in OF_A_USER)}

    def run(self, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.nibble, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self.environment,
            cwd=ROOT,
            check=False,
        )

    def processes(self) -> list[str]:
        """The command lines of the processes that carry this sandbox in their environment."""
        return [command for _, command, _ in self._processes()]

    def titled(self) -> list[tuple[int, str]]:
        """The same with their ids."""
        return [(pid, command) for pid, command, _ in self._processes()]

    def folders_outside(self) -> set[Path]:
        """What its processes use in /tmp beside the sandbox: HAProxy's files."""
        found = {name for *_, environment in self._processes() for name in re.findall(rb"/tmp/nibble-\w+", environment)}
        return {Path(name.decode()) for name in found}

    def _processes(self) -> Iterator[tuple[int, str, bytes]]:
        """Id, command line and environment of each."""
        marker = f"RAY_TMPDIR={self.ray_tmpdir}\0".encode()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if marker in (environment := (process / "environ").read_bytes()):
                    command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if command.strip():  # else it is ending
                        yield int(process.name), command.strip(), environment
            except OSError:
                continue  # it ended meanwhile, or is another user's

    def wait_no_processes(self, timeout: float = 60) -> list[str]:
        """What is still there after `timeout` seconds at most."""
        deadline = time.monotonic() + timeout
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left


@contextmanager
def sandbox(nameless: bool = False, **extra: str) -> Iterator[Sandbox]:
    with tempfile.TemporaryDirectory(prefix="nbt", ignore_cleanup_errors=True) as folder:
        home, ray_tmpdir = Path(folder) / "home", Path(folder) / "ray"
        home.mkdir()
        ray_tmpdir.mkdir()
        yield Sandbox(home, ray_tmpdir, extra, nameless)


@dataclass
class Served:
    """A running `nibble serve`; `output` is what it printed until it was ready."""

    sandbox: Sandbox
    process: subprocess.Popen[str]
    log: Path
    http: str
    grpc: str

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def ray_address(self) -> str:
        return next(line.split()[-1] for line in self.output.splitlines() if line.startswith("Ray cluster at"))

    def stop(self, number: int = signal.SIGINT, timeout: float = 150) -> int:
        """SIGINT goes to the whole process group, as Ctrl-C in a terminal; another signal to the command alone, as a
        supervisor sends it. The exit code."""
        send = os.killpg if number == signal.SIGINT else os.kill
        send(self.process.pid, number)
        return self.process.wait(timeout)


@contextmanager
def serving(
    home: Sandbox,
    config: str,
    http_port: int,
    grpc_port: int,
    *arguments: str,
    until: str = "Ctrl-C ends it",
    timeout: float = 600,
) -> Iterator[Served]:
    """`nibble serve` with a configuration, once it has printed `until`; ended at the end, by force where it must be."""
    path = home.home / "nibble.yaml"
    path.write_text(f"http: {{port: {http_port}}}\ngrpc: {{port: {grpc_port}}}\n{config}")
    log = home.home / "serve.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*home.nibble, "serve", str(path), *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            env=home.environment,
            cwd=ROOT,
            start_new_session=True,
        )
    served = Served(home, process, log, f"http://127.0.0.1:{http_port}", f"127.0.0.1:{grpc_port}")
    try:
        wait_for_line(served, until, timeout)
        yield served
    finally:
        if process.poll() is None:
            try:
                served.stop()
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_for_line(served: Served, words: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while words not in served.output:
        assert served.process.poll() is None, f"nibble serve ended early:\n{served.output}"
        assert time.monotonic() < deadline, f"no {words!r} within {timeout} s:\n{served.output}"
        time.sleep(0.1)


def assert_ends_cleanly(served: Served, number: int) -> None:
    """Ends `nibble serve` by a signal, which leaves no process and no file."""
    home = served.sandbox
    outside = home.folders_outside()
    assert outside
    assert served.stop(number) == 0, served.output
    assert home.wait_no_processes() == []
    assert list(home.ray_tmpdir.iterdir()) == []
    assert not list((home.home / ".cache" / "nibble" / "clusters").glob("*"))
    assert not any(folder.exists() for folder in outside)


def replicas(home: Sandbox, deployment: str) -> set[int]:
    """The processes of a deployment's replicas."""
    return {pid for pid, title in home.titled() if replica_of(title) == deployment}
