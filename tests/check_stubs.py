"""`python -m tests.check_stubs`: the generated stubs are what their .proto files give. Exit code 1 where not."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROTOS = ("inference", "open_inference")
STUBS = tuple(f"{name}{ending}" for name in PROTOS for ending in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py"))


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
    problems = stale_stubs()
    print("\n".join(problems) or "stubs are fresh")
    sys.exit(1 if problems else 0)
