"""Changes to a checkpoint's folder that tests of planning make: to config.json and to the stored tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.checkpoints.weights import WeightsReader, weight_sources
from tests.random_checkpoint import write_weights


def change_config(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrites model.safetensors with its tensors, as {name: (type, shape, data)}, changed."""
    tensors: dict[str, Any] = {}
    with WeightsReader(checkpoint) as reader:
        for name, source in weight_sources(checkpoint).items():
            tensors[name] = (source.type, source.shape, reader.rows(source, 0, source.shape[0]).tobytes())
    change(tensors)
    write_weights(checkpoint, tensors)


def rename_tensors(checkpoint: Path, renamed: Callable[[str], str]) -> None:
    def rename(tensors: dict[str, Any]) -> None:
        stored = dict(tensors)
        tensors.clear()
        tensors.update({renamed(name): tensor for name, tensor in stored.items()})

    change_tensors(checkpoint, rename)
