"""`nibble bench` as a process, and the measuring of processes in tests/bench."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.ray_cluster import free_ports
from tests.bench.measured import measure
from tests.unit.sse_server import SseServer


def test_ctrl_c_shows_and_writes_what_was_measured_and_exits_with_130(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    with SseServer() as server:
        command = [sys.executable, "-m", "cluster.cli", "bench", "m", "--url", server.url, "--concurrency", "1"]
        command += ["--requests", "1000000", "--output-tokens", "3", "--json", str(file)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while len(server.bodies) < 30:
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        output, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in errors
    assert "│ output tokens/s" in output
    assert "round 1 ended early: interrupted" in output
    (round,) = json.loads(file.read_text())["levels"][0]["servers"][0]["rounds"]
    assert round["requests_succeeded"] >= 20
    assert round["ending"] == "interrupted"


def test_a_server_that_is_not_there_is_a_line_and_exit_code_1() -> None:
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "cluster.cli", "bench", "m", "--url", f"http://127.0.0.1:{port}"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert found.stdout == ""
    (line,) = found.stderr.splitlines()
    assert line.startswith(f"nibble: http://127.0.0.1:{port}: connection: ")
    assert line.endswith("is a server running there?")


def test_memory_and_writes_of_descendants_are_measured(tmp_path: Path) -> None:
    inner = "import os, time; x = bytes(200_000_000); f = open('out', 'wb'); f.write(x[:50_000_000]); f.flush();"
    inner += (
        "os.fsync(f.fileno()); y = bytearray(b'1') * 200_000_000; print('done'); [time.sleep(0.1) for _ in range(15)]"
    )
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}, 'marked'], check=True)"
    run = measure([sys.executable, "-c", outer], dict(os.environ), tmp_path, "marked")
    assert run.output == "done\n"
    assert run.peak > 200e6
    assert 200e6 < run.private <= run.peak
    assert run.largest > 200e6
    assert run.seconds > run.cpu_seconds > 0
    with pytest.raises(RuntimeError, match=r"ended with 3: said"):
        measure([sys.executable, "-c", "print('said'); raise SystemExit(3)"], dict(os.environ), tmp_path, "x")
