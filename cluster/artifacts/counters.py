"""What the artifact store has done since it began, for /metrics."""

from __future__ import annotations

from dataclasses import dataclass, field


def zeros(*names: str) -> dict[str, int]:
    return dict.fromkeys(names, 0)


@dataclass
class StoreCounters:
    """`fetches`: artifacts that replicas took, which their node had or copied from the object store. `reads`: artifacts
    that were read into the object store, from where. `conversions`: by how they ended; those that succeeded made
    `conversion_bytes` bytes in `conversion_s` seconds."""

    fetches: dict[str, int] = field(default_factory=lambda: zeros("node_cache", "object_store"))
    reads: dict[str, int] = field(default_factory=lambda: zeros("node_cache", "durable"))
    conversions: dict[str, int] = field(default_factory=lambda: zeros("done", "failed"))
    conversion_bytes: int = 0
    conversion_s: float = 0.0
