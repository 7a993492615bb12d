"""A node that bigdl-llm has no library for, as arm64 is: it converts, and engine openvino runs the artifact."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from cluster.families import FamilyName
from tests.conftest import DEMOS

Artifact = Callable[[FamilyName], Path]

# In a process of its own: `bigdl` must not be found by any module, nor a flag by those that take `cpu_flags` by name.
HIDE = """
import platform, sys

sys.modules["bigdl"] = None
platform.machine = lambda: "aarch64"
import cluster.machine.isa
cluster.machine.isa.cpu_flags = lambda: frozenset()
"""

CHECK = f"""{HIDE}
from deployments.engines.check import main
sys.exit(main())
"""

NODE = f"""{HIDE}
import asyncio, json
from pathlib import Path

from cluster.model_config import ModelConfig
from cluster.errors import EngineError
from deployments.engines.base import TokenRequest
from deployments.engines.loading import load_engine
from deployments.records import SamplingParams
from tests.conftest import convert_here

checkpoint, made = map(Path, sys.argv[1:])
convert_here(checkpoint, "llama", made)
model = dict(name="m", family="llama", checkpoint="builtin:llama", threads=1)
said = dict(isa=cluster.machine.isa.isa_name())
try:
    load_engine(ModelConfig(**model), [made], None)
except EngineError as error:
    said["bigdl"] = str(error)
engine = load_engine(ModelConfig(**model, engine="openvino"), [made], None)

async def generate():
    request = TokenRequest([5, 6, 7, 8], 8, SamplingParams(temperature=0))
    return [token.id async for batch in engine.generate(request) for token in batch]

said["tokens"] = asyncio.run(generate())
engine.close()
print(json.dumps(said))
"""


def run(program: str, *arguments: str | Path) -> str:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_converts_to_the_same_bytes_and_serves_with_openvino(demo_artifact: Artifact, tmp_path: Path) -> None:
    said = json.loads(run(NODE, DEMOS / "llama", tmp_path / "made").splitlines()[-1])
    (name,) = (path.name for path in demo_artifact("llama").glob("bigdl_llm_*.bin"))
    assert (tmp_path / "made" / name).read_bytes() == (demo_artifact("llama") / name).read_bytes()
    assert said["isa"] == "aarch64"
    assert len(said["tokens"]) == 8
    assert said["bigdl"] == (
        "engine bigdl needs x86-64 with AVX, for bigdl-llm's libraries; this node is aarch64 without AVX: use engine"
        " openvino"
    )


def test_an_artifact_is_checked_with_openvino_there(demo_artifact: Artifact) -> None:
    run(CHECK, demo_artifact("llama"))
