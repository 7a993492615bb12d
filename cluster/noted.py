"""Where each `nibble serve` notes its cluster, for `nibble status` in another terminal. Needs no Ray.

~/.cache/nibble/clusters/<pid>.json    one file a server, which deletes its own
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from cluster.errors import ConfigError

CLUSTERS = Path("~/.cache/nibble/clusters")


class Note(NamedTuple):
    address: str  # of Ray
    pid: int
    auth_mode: str | None


@contextmanager
def noted(ray_address: str) -> Iterator[None]:
    """While a served cluster runs. Where there is no home that can be written, there is no note."""
    note = Note(ray_address, os.getpid(), os.environ.get("RAY_AUTH_MODE"))
    file: Path | None = None
    with suppress(OSError, RuntimeError):  # RuntimeError: a user without a home
        folder = CLUSTERS.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        remove_dead(folder)
        file = folder / f"{note.pid}.json"
        new = file.with_suffix(".new")  # whoever looks meanwhile finds it whole, or not at all
        new.write_text(json.dumps(note._asdict()))
        new.replace(file)
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                file.unlink(missing_ok=True)


def noted_address() -> str:
    """The Ray address of the cluster that `nibble serve` runs on this machine. Raises ConfigError where none runs, or
    several do.

    Call it before Ray is imported: Ray reads RAY_AUTH_MODE then, and turns token authentication on by itself for a
    node it starts, but never for an address it is given.
    """
    notes = living()
    if not notes:
        raise ConfigError("no `nibble serve` runs on this machine; start one, or give --address HOST:PORT")
    if len(notes) > 1:
        found = ", ".join(f"{note.address} (process {note.pid})" for note in notes)
        raise ConfigError(
            f"several `nibble serve` run on this machine: {found}; say which one with --address HOST:PORT"
        )
    (note,) = notes
    if note.auth_mode:
        os.environ.setdefault("RAY_AUTH_MODE", note.auth_mode)
    return note.address


def living() -> list[Note]:
    """The notes of servers that run."""
    try:
        files = sorted(CLUSTERS.expanduser().glob("*.json"))
    except (OSError, RuntimeError):
        return []
    return [note for note in map(read, files) if note is not None]


def read(file: Path) -> Note | None:
    """None for one that is damaged, or whose server was killed."""
    try:
        values = json.loads(file.read_text())
        note = Note(str(values["address"]), values["pid"], values["auth_mode"])
        os.kill(note.pid, 0)
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return note


def remove_dead(folder: Path) -> None:
    for file in folder.glob("*.json"):
        if read(file) is None:
            file.unlink(missing_ok=True)
