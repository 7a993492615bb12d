"""What Ray's worker processes call themselves."""

from __future__ import annotations

import re

# Serve names an actor `ServeReplica:app:deployment`. While one of an actor's methods runs (a health check, say), Ray
# shows what follows the last dot of the actor's name, then `.method`; an application of nibble's may have a dot.
REPLICA = re.compile(r"ray::(?:ServeReplica:)?[^: ]+:(?P<deployment>[^:. \0]+)(?:\.\w+)?[\0 ]*")


def replica_of(title: str) -> str | None:
    """The deployment, whose name must have no dot, of the replica whose process has this title; None: another
    process."""
    found = REPLICA.fullmatch(title)
    return found and found["deployment"]
