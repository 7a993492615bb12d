"""Watches one HAProxy process of Serve, and stands in for it where it dies. A program of the standard library alone:

    python -IS haproxy_stand_in.py PID RAYLET HAPROXY --config=FILE

Serve notices a dead HAProxy, or a dead actor that ran it, by failed health checks, and starts another one: 5 to 6 s in
which connections are refused (Ray 2.60). A process with the same configuration and an admin socket of its own takes the
port at once, and ends when Serve's next one answers; where there is none after STAND_IN_S, or the raylet (process
RAYLET) is gone, it ends as well. Serve's orderly end of a HAProxy is a kill too, and cannot be told from a fault.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1  # of prctl(2)
STAND_IN_S = 60
START_S = 60  # in which a new HAProxy answers
POLL_S = 0.2
ANSWER_S = 2
SUFFIX = ".stand-in"


class StandIn:
    """`config`: the file that Serve's HAProxy was started with."""

    def __init__(self, program: str, config: Path) -> None:
        self._program = program
        self._config = config.read_text()
        self._own_config = config.with_name(config.name + SUFFIX)
        found = re.search(r"^ *stats socket (\S+)", self._config, re.MULTILINE)
        if found is None:
            raise ValueError(f"{config}: found no line `stats socket`")
        self._socket = found[1]

    def answering(self) -> int | None:
        """The process that answers at Serve's admin socket."""
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(ANSWER_S)
                connection.connect(self._socket)
                connection.sendall(b"show info\n")
                answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        except OSError:
            return None
        found = re.search(rb"^Pid: *(\d+)", answer, re.MULTILINE)
        return int(found[1]) if found else None

    def start(self) -> subprocess.Popen[bytes]:
        self._own_config.write_text(self._config.replace(self._socket, self._socket + SUFFIX))
        command = [self._program, "-dS", "-db", "-f", str(self._own_config)]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=end_with_parent)


def end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def wait(seconds: float, *processes: int) -> set[int]:
    """Those of the processes (by their pidfd) that have ended by then."""
    poll = select.poll()
    for process in processes:
        poll.register(process, select.POLLIN)
    return {process for process, _ in poll.poll(None if seconds < 0 else seconds * 1000)}


def main(arguments: list[str]) -> None:
    number, raylet_number, program, config = arguments
    try:
        haproxy, raylet = os.pidfd_open(int(number)), os.pidfd_open(int(raylet_number))
        stand_in = StandIn(program, Path(config.removeprefix("--config=")))
    except ProcessLookupError:
        return  # too late to watch anything
    deadline = time.monotonic() + START_S
    ended: set[int] = set()
    while not ended and stand_in.answering() != int(number) and time.monotonic() < deadline:
        ended = wait(POLL_S, haproxy, raylet)
    if not ended:
        ended = wait(-1, haproxy, raylet)
    if raylet in ended or stand_in.answering() is not None:  # a reload: the next one has taken over
        return
    process = stand_in.start()
    running, deadline = os.pidfd_open(process.pid), time.monotonic() + STAND_IN_S
    ended = set()
    while not ended and stand_in.answering() is None and time.monotonic() < deadline:
        ended = wait(POLL_S, running, raylet)
    if not ended and stand_in.answering() is not None:  # Serve's next one has the port
        process.send_signal(signal.SIGUSR1)  # takes no more connections, and ends when those that it has do
        wait(-1, running, raylet)
    process.terminate()
    process.wait()


if __name__ == "__main__":
    main(sys.argv[1:])
