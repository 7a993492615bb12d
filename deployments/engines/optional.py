"""The engines that an extra of the package brings: imported only where a model asks for them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config import OpenvinoConfig
from cluster.errors import EngineError

if TYPE_CHECKING:
    from deployments.engines.openvino import OpenvinoEngine


def require_openvino() -> None:
    """Raises EngineError where the package openvino is not installed."""
    if find_spec("openvino") is None:
        raise EngineError(
            "engine openvino needs the package openvino, which is not installed here: pip install"
            " 'nibble-serve[openvino]' on every node"
        )


def load_openvino(
    folder: Path,
    threads: int,
    context: int,
    max_running: int,
    options: OpenvinoConfig | None = None,
    cores: tuple[int, ...] | None = None,
) -> OpenvinoEngine:
    """As OpenvinoEngine. Raises EngineError where its package is not installed."""
    require_openvino()
    from deployments.engines.openvino import OpenvinoEngine

    return OpenvinoEngine(folder, threads, context, max_running, options or OpenvinoConfig(), cores)
