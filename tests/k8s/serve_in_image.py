"""Run inside the image, read by `python -`: starts a head as KubeRay does, gives it a configuration over the REST API
as the operator does, and asks each model over HTTP. Prints the answers, and what each process takes, as one line of
JSON."""

from __future__ import annotations

import json
import os
import subprocess
import time
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

import yaml

from cluster.config import LimitsConfig
from cluster.serve_settings import serve_settings

CONFIG = """
artifacts: {cache_dir: /var/cache/nibble}
models:
  - {name: one, family: llama, checkpoint: "builtin:llama", engine: openvino, threads: 1}
  - {name: two, family: bloom, checkpoint: "builtin:bloom", engine: bigdl, threads: 1}
"""
MODELS = ("one", "two")
WAIT_S = 240


def called(url: str, body: object = None, method: str | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = Request(url, data, {"Content-Type": "application/json"}, method=method)
    with urlopen(request, timeout=120) as answer:
        return answer.read().decode()


def wait_for(url: str) -> str:
    end = time.monotonic() + WAIT_S
    while True:
        try:
            return called(url)
        except (OSError, HTTPException) as error:  # not yet, or 503
            if time.monotonic() > end:
                raise TimeoutError(f"{url}: {error} after {WAIT_S} s") from error
            time.sleep(0.5)


def processes() -> list[tuple[str, int]]:
    """The title of each, and its bytes of memory without pages of files and the object store."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            title = (folder / "cmdline").read_text(errors="replace")
            lines = (folder / "smaps_rollup").read_text().splitlines()
            found.append((title, sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon:"))))
    return found


def main() -> None:
    os.environ.update(serve_settings(LimitsConfig()))
    start = "ray start --head --num-cpus=3 --object-store-memory=200000000 --dashboard-host=127.0.0.1"
    started = subprocess.run(["bash", "-lc", start], capture_output=True, text=True, check=False)
    assert started.returncode == 0, started.stdout + started.stderr
    wait_for("http://127.0.0.1:52365/api/healthz")  # the probes' path
    Path("/tmp/nibble.yaml").write_text(CONFIG)
    rendered = subprocess.run(["nibble", "render", "/tmp/nibble.yaml"], capture_output=True, text=True, check=True)
    called("http://127.0.0.1:8265/api/serve/applications/", yaml.safe_load(rendered.stdout), "PUT")
    wait_for("http://127.0.0.1:8000/readyz")
    wait_for("http://127.0.0.1:8000/-/healthz")
    answers = {}
    for model in MODELS:
        asked = {"model": model, "prompt": "Q: What is CPU? A:", "max_tokens": 8, "temperature": 0}
        answers[model] = json.loads(called("http://127.0.0.1:8000/v1/completions", asked))
    print(json.dumps({"answers": answers, "processes": processes()}))


main()
