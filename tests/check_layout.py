"""`python -m tests.check_layout`: imports go one way, and the generated stubs are fresh. Exit code 1 where not.

protos  <-  cluster  <-  deployments, and the command line (cluster/cli.py, cluster/commands/) above both
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMAND_LINE = (ROOT / "cluster" / "cli.py", ROOT / "cluster" / "commands")
PROTOS = ("inference", "open_inference")
STUBS = tuple(f"{name}{ending}" for name in PROTOS for ending in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py"))

# No Ray below these: pure planning and conversion, files, engines and the router's one path run and are tested without.
RAY_FREE = (
    "cluster/checkpoints/folder.py",
    "cluster/checkpoints/config_fields.py",
    "cluster/display.py",
    "cluster/artifacts/ggml.py",
    "cluster/checkpoints/hub.py",
    "cluster/checkpoints/hub_download.py",
    "cluster/checkpoints/hub_requests.py",
    "cluster/checkpoints/hyperparameters.py",
    "cluster/conversion/layouts.py",
    "cluster/conversion/local.py",
    "cluster/conversion/plan.py",
    "cluster/conversion/quantize.py",
    "cluster/checkpoints/rotary.py",
    "cluster/conversion/shard.py",
    "cluster/conversion/steps.py",
    "cluster/checkpoints/torch_weights.py",
    "cluster/checkpoints/sources.py",
    "cluster/checkpoints/tokenizer_config.py",
    "cluster/checkpoints/tokenizer_files.py",
    "cluster/checkpoints/tokenizer_json.py",
    "cluster/checkpoints/tokenizer_model.py",
    "cluster/artifacts/verified.py",
    "cluster/checkpoints/vocabulary.py",
    "cluster/artifacts/node_cache.py",
    "cluster/conversion/wanted.py",
    "deployments/engines",
    "deployments/generation/generation.py",
    "deployments/routing/router.py",
    "deployments/engines/sampling.py",
    "deployments/api/schema.py",
    "deployments/generation/text.py",
)


def imported(path: Path) -> set[str]:
    """The top-level names of the modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def wrong_imports() -> list[str]:
    problems = []
    for path in sorted((ROOT / "cluster").rglob("*.py")):
        command_line = any(path == place or place in path.parents for place in COMMAND_LINE)
        if not command_line and "deployments" in imported(path):
            problems.append(f"{path.relative_to(ROOT)} imports deployments; cluster stands below it")
    for name in RAY_FREE:
        place = ROOT / name
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            if "ray" in imported(path):
                problems.append(f"{path.relative_to(ROOT)} imports ray; keep what crosses a process elsewhere")
    return problems


def stale_stubs() -> list[str]:
    """Stubs that differ from what their .proto files give now."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
        command = [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            "-I.",
            *outputs,
            *(f"protos/{name}.proto" for name in PROTOS),
        ]
        subprocess.run(command, cwd=ROOT, check=True)
        fresh = Path(folder) / "protos"
        stale = [name for name in STUBS if (fresh / name).read_bytes() != (ROOT / "protos" / name).read_bytes()]
    return [f"protos/{name} is not what its .proto file gives: run `make protos`" for name in stale]


if __name__ == "__main__":
    problems = wrong_imports() + stale_stubs()
    print("\n".join(problems) or "layout: imports go one way, stubs are fresh")
    sys.exit(1 if problems else 0)
