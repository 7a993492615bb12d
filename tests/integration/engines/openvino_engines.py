"""What the tests of the openvino engine share: prompts, and engines that are closed at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from cluster.errors import EngineError
from cluster.families import FamilyName
from cluster.model_config import OpenvinoConfig
from deployments.engines.base import Token, TokenRequest
from deployments.engines.openvino.engine import OpenvinoEngine
from deployments.records import SamplingParams

Artifact = Callable[[FamilyName], Path]
Load = Callable[..., OpenvinoEngine]
CONTEXT, TOKENS = 256, 24
GREEDY = SamplingParams(temperature=0)
PRECISE = OpenvinoConfig(tune="precision")


def prompt(seed: int, length: int = 40) -> list[int]:
    return np.random.default_rng(seed).integers(3, 300, length).tolist()


async def collect(engine: OpenvinoEngine, request: TokenRequest) -> list[Token]:
    return [token async for batch in engine.generate(request) for token in batch]


async def ids(engine: OpenvinoEngine, request: TokenRequest) -> list[int]:
    return [token.id for token in await collect(engine, request)]


def fail(*_: object) -> None:
    """In the place of a model's step."""
    raise EngineError("OpenVINO failed")


@contextmanager
def llama_engines(demo_artifact: Artifact) -> Iterator[Load]:
    """A function that loads the demo llama; what it loaded is whole at the end, and closed."""
    engines = []

    def load(max_running: int = 8, draft: FamilyName | None = None, **options: object) -> OpenvinoEngine:
        if draft:
            options["draft"] = {"checkpoint": f"builtin:{draft}"}
        config = OpenvinoConfig.model_validate({"tune": "precision", **options})
        folder = demo_artifact(draft) if draft else None
        engines.append(OpenvinoEngine(demo_artifact("llama"), 1, CONTEXT, max_running, config, draft=folder))
        return engines[-1]

    yield load
    for engine in engines:
        engine.check_integrity()
        engine.close()
