"""Where `nibble serve` notes its cluster, for `nibble status` in another terminal. Needs no Ray."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import ConfigError

STATE_FILE = Path("~/.cache/nibble/cluster.json").expanduser()


@contextmanager
def noted(ray_address: str) -> Iterator[None]:
    """Keeps STATE_FILE while a served cluster runs."""
    STATE_FILE.parent.mkdir(parents=True, exist_ok=True)
    state = {"address": ray_address, "pid": os.getpid(), "auth_mode": os.environ.get("RAY_AUTH_MODE")}
    STATE_FILE.write_text(json.dumps(state))
    try:
        yield
    finally:
        STATE_FILE.unlink(missing_ok=True)


def noted_address() -> str:
    """The Ray address of the cluster that `nibble serve` runs on this machine. Raises ConfigError where none runs.

    Call it before Ray is imported: Ray reads RAY_AUTH_MODE then, and turns token authentication on by itself for a
    node it starts, but never for an address it is given.
    """
    try:
        state = json.loads(STATE_FILE.read_text())
        os.kill(state["pid"], 0)
        address, auth_mode = str(state["address"]), state["auth_mode"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError("no `nibble serve` runs on this machine; start one, or give --address HOST:PORT") from None
    if auth_mode:
        os.environ.setdefault("RAY_AUTH_MODE", auth_mode)
    return address
