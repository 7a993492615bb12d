"""The router's log of requests, as a test reads it: a line is written after its answer, so it is waited for."""

from __future__ import annotations

import json
import time
from typing import Any

from tests.integration.processes import Served

TIMEOUT_S = 60


def router_logs(served: Served) -> list[str]:
    """What each router has logged."""
    return [path.read_text() for path in served.sandbox.ray_tmpdir.rglob("replica_nibble_router_*.log")]


def logged(served: Served, request_id: str) -> list[dict[str, Any]]:
    """The complete lines of one request."""
    lines = [line for text in router_logs(served) for line in text.splitlines(keepends=True)]
    found = [line for line in lines if f'"request_id": "{request_id}"' in line and line.endswith("\n")]
    return [json.loads(line[line.index("{") :]) for line in found]


def wait_logged(served: Served, request_id: str) -> dict[str, Any]:
    """The one line of a request, once there is one."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := logged(served, request_id)):
        assert time.monotonic() < deadline, f"no log line of {request_id}"
        time.sleep(0.1)
    assert len(found) == 1, found
    return found[0]
