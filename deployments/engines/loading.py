"""Which class runs which `engine:` of a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from cluster.errors import EngineError
from cluster.families import EngineName
from cluster.model_config import ModelConfig, OpenvinoConfig
from deployments.engines.base import Engine
from deployments.engines.bigdl.engine import BigdlEngine

# What a process that runs the engine is to be started with. The openvino engine's packed weights lie in memory of
# malloc's: in huge pages a step of 8 sequences takes a tenth less time (tests/bench/NOTES.md). glibc reads this once,
# at the start.
ENVIRONMENT: dict[EngineName, dict[str, str]] = {
    "bigdl": {},
    "openvino": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
}


def load_engine(model: ModelConfig, folders: Sequence[Path], cores: tuple[int, ...] | None) -> Engine:
    """The model's engine with its artifacts (`wanted_artifacts`) in `folders`, on `cores` (None: all of this process).
    Raises EngineError where its package is missing, and what the engine itself raises."""
    folder, *drafts = folders
    if model.engine == "bigdl":
        return BigdlEngine(folder, threads=model.threads, context=model.context, cores=cores, isa=model.isa)
    require_openvino()
    from deployments.engines.openvino.engine import OpenvinoEngine  # its package is an extra

    options = model.openvino or OpenvinoConfig()
    draft = drafts[0] if drafts else None
    return OpenvinoEngine(folder, model.threads, model.context, model.max_ongoing, options, cores, draft)


def require_openvino() -> None:
    """Raises EngineError where the package openvino is not installed."""
    if find_spec("openvino") is None:
        raise EngineError(
            "engine openvino needs the package openvino, which is not installed here: pip install"
            " 'nibble-serve[openvino]' on every node"
        )
