"""What the router is told: the configuration, and where each model runs. It changes without a restart of anything."""

from __future__ import annotations

from pydantic import field_serializer

from cluster.artifacts.manifest import Record
from cluster.config import NibbleConfig


class RouterSettings(Record):
    """`apps`: of each model, the Serve application that its requests go to. `awaited`: models whose requests wait for a
    replica, while they have none, instead of being refused. `draining`: nothing new is taken."""

    config: NibbleConfig
    apps: dict[str, str]
    awaited: frozenset[str] = frozenset()
    draining: bool = False

    @field_serializer("awaited")
    def _in_order(self, awaited: frozenset[str]) -> list[str]:
        """The same text each time: a committed manifest has it."""
        return sorted(awaited)
