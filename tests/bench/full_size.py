"""The reference's default checkpoint of a family, at full size: converted, run, served by each engine, measured.

    python -m tests.bench.full_size FAMILY [--steps make,convert,pipeline,bigdl,openvino,bigdl-two,openvino-two,hub]
                                    [--keep FOLDER] [--code FOLDER]

`make` writes a look-alike (tests/default_checkpoints.py says what of it is known) of 4.6 to 14 GB; the other steps need
it: with --keep it stays in FOLDER, beside the node cache and results.json, and single steps can be run one after the
other. `nibble` is that of --code, by default of this tree. The steps of serving start from the node cache (which
`pipeline` fills, where the checkpoint is not in it), `-two` with two replicas of one thread each; `hub` runs the
pipeline against a Hub on loopback that serves the files under the reference's name.

Private memory is what is no page of a file (anonymous), mapped what is; of two replicas both are sums, the mapped of
proportional parts. A replica is ready when /readyz says so; its time begins with its process. "restored" is from Ray's
start to the deployment, "workers" the most of Ray's worker processes meanwhile. Every step is bounded in time, and ends
early where the machine has less than 1 GB of memory left.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from cluster.families import FAMILIES, FAMILY_NAMES, FamilyName
from cluster.ray_cluster import free_ports
from tests.bench.measured import descendants, measure, memory_of, title_of
from tests.bench.serving import NOW, ROOT, answers
from tests.default_checkpoints import mend_llama, write_default_checkpoint
from tests.hub_lookalike import HubLookalike
from tests.ray_titles import replica_of

STEPS = ("make", "convert", "pipeline", "bigdl", "openvino", "bigdl-two", "openvino-two", "hub")
NEEDED_BYTES = 25 << 30  # of disk: the checkpoint, the artifact, what the engine derives, one copy more
LEFT_BYTES = 1 << 30  # of memory, below which a step ends
STEP_S = 420
SETTLED_S = 60
GIB = 1 << 30
LAST_LINE = "Ctrl-C ends it."
Figures = dict[str, Any]


class Bench(NamedTuple):
    """`folder` holds the checkpoint, a home for the code under test, and the figures."""

    family: FamilyName
    folder: Path
    code: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def environment(self) -> dict[str, str]:
        home = self.folder / "home"
        (home / "ray").mkdir(parents=True, exist_ok=True)
        own = {"HOME": str(home), "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "PYTHONPATH": str(self.code)}
        return {**os.environ, **own, "RAY_TMPDIR": str(home / "ray")}

    def nibble(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "cluster.cli", *arguments]


def make(bench: Bench) -> Figures:
    """Also the smallest change where the code under test refuses the repository's own spelling."""
    started = NOW()
    write_default_checkpoint(bench.checkpoint, bench.family)
    size = sum(path.stat().st_size for path in bench.checkpoint.iterdir())
    return {"seconds": round(NOW() - started, 1), "bytes": size, "files": len(list(bench.checkpoint.iterdir()))}


def convert(bench: Bench) -> Figures:
    output = bench.folder / "converted"
    command = bench.nibble("convert", str(bench.checkpoint), "--family", bench.family, "--output", str(output))
    try:
        return run(bench, command)
    finally:
        shutil.rmtree(output, ignore_errors=True)


def pipeline(bench: Bench) -> Figures:
    return run(bench, pipeline_command(bench, "--repo-id-or-model-path", str(bench.checkpoint)))


def pipeline_command(bench: Bench, *arguments: str) -> list[str]:
    return bench.nibble("pipeline", "--thread-num", "2", "--model-family", bench.family, *arguments)


def run(bench: Bench, command: list[str], **variables: str) -> Figures:
    """What one command took; where llama's own spelling is refused, with what words, and what it took mended."""
    try:
        measured = measure(command, bench.environment | variables, bench.code, "nothing", STEP_S)
    except RuntimeError as error:
        refusal = " ".join(str(error).split())[-300:]
        config = json.loads((bench.checkpoint / "config.json").read_text())
        if bench.family != "llama" or config["architectures"] != ["LLaMAForCausalLM"]:
            return {"refused": refusal}
        mend_llama(bench.checkpoint)
        return {"refused": refusal, **run(bench, command, **variables)}
    return {
        "cpu_seconds": round(measured.cpu_seconds, 1),
        "seconds": round(measured.seconds, 1),
        "private_gib": gib(measured.private),
        "peak_gib": gib(measured.peak),
        "written_gib": gib(measured.written),
        "last_lines": measured.output.splitlines()[-12:],
    }


def served(engine: str, replicas: int) -> Callable[[Bench], Figures]:
    return lambda bench: serve(bench, engine, replicas)


def serve(bench: Bench, engine: str, replicas: int) -> Figures:
    http, grpc = free_ports(2)
    config, url = bench.folder / "nibble.yaml", f"http://127.0.0.1:{http}"
    model = {"name": "model", "family": bench.family, "checkpoint": str(bench.checkpoint), "engine": engine}
    model |= {"threads": 2 // replicas, "context": 512, "replicas": {"min": replicas, "max": replicas}}
    # YAML is a superset of JSON.
    config.write_text(json.dumps({"http": {"port": http}, "grpc": {"port": grpc}, "models": [model]}))
    log = bench.folder / f"serve-{engine}-{replicas}.log"
    with started(bench.nibble("serve", str(config)), bench, log) as child:
        figures = watched_start(child, log, url)
        print("started", json.dumps(figures), file=sys.stderr, flush=True)  # whatever becomes of the request
        if "failed" not in figures:
            sent = NOW()
            ask(url, replicas)
            figures |= {"requests_s": round(NOW() - sent, 1), **replicas_memory(child.pid)}
    return figures


@contextmanager
def started(command: list[str], bench: Bench, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Ended at the end with all its descendants, by SIGINT and where that does not help by force."""
    with log.open("w") as file:
        child = subprocess.Popen(
            command, env=bench.environment, cwd=bench.code, stdout=file, stderr=subprocess.STDOUT
        )  # fmt: skip
        try:
            yield child
        finally:
            tree = {child.pid} | descendants({child.pid})
            child.send_signal(signal.SIGINT)
            try:
                child.wait(60)
            except subprocess.TimeoutExpired:
                tree |= descendants(tree)
            for pid in tree - {child.pid} if child.poll() is not None else tree:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue  # it ended with the others
            child.wait()


def watched_start(child: subprocess.Popen[bytes], log: Path, url: str) -> Figures:
    """Until the last line is there: seconds of each part, the most worker processes and the greatest memory."""
    begun, figures = NOW(), dict.fromkeys(("workers", "workers_private_gib", "peak_private_gib"), 0.0)
    seen: dict[str, float] = {}
    while LAST_LINE not in (text := log.read_text()):
        time.sleep(0.2)
        failure = failed(child, NOW() - begun)
        if failure:
            return {**figures, **seen, "failed": failure, "last_lines": text.splitlines()[-8:]}
        titles = {pid: title_of(pid) for pid in descendants({child.pid})}
        replicas = [pid for pid, title in titles.items() if replica_of(title) == "model"]
        private = sum(memory_of(pid).private for pid in replicas)
        figures["peak_private_gib"] = max(figures["peak_private_gib"], gib(private))
        if "Ray cluster at" in text and "cluster_s" not in seen:
            seen["cluster_s"] = round(NOW() - begun, 1)
        if "cluster_s" in seen and "restored_s" not in seen:
            workers = [pid for pid, title in titles.items() if title.startswith("ray::")]
            figures["workers"] = max(figures["workers"], len(workers))
            memory = gib(sum(memory_of(pid).private for pid in workers))
            figures["workers_private_gib"] = max(figures["workers_private_gib"], memory)
            if "model:" in text or replicas:
                seen["restored_s"] = round(NOW() - begun - seen["cluster_s"], 1)
        if replicas and "replica_begin_s" not in seen:
            seen["replica_begin_s"] = round(NOW() - begun, 1)
        if replicas and "ready_s" not in seen and answers(f"{url}/readyz"):
            seen["ready_s"] = round(NOW() - begun - seen["replica_begin_s"], 1)
    return {**figures, **seen, "greeted_s": round(NOW() - begun, 1)}


def failed(child: subprocess.Popen[bytes], seconds: float) -> str | None:
    """Why a step must end early."""
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
    if int(available.split()[1]) * 1024 < LEFT_BYTES:
        return "the machine has no memory left"
    if child.poll() is not None:
        return f"ended with {child.returncode}"
    return f"not ready after {STEP_S} s" if seconds > STEP_S else None


def ask(url: str, replicas: int) -> None:
    """A request for each replica, at the same time."""
    body = {"model": "model", "prompt": "Q: What is CPU? A:", "max_tokens": 16, "temperature": 0, "n": replicas}
    httpx.post(f"{url}/v1/completions", json=body, timeout=STEP_S).raise_for_status()


def replicas_memory(root: int) -> Figures:
    """Of the replicas' processes, once it grows no more: a cache may get its memory after the first requests. What
    processes share counts once."""
    before, deadline = -1.0, NOW() + SETTLED_S
    while True:
        pids = [pid for pid in descendants({root}) if replica_of(title_of(pid)) == "model"]
        each = [memory_of(pid) for pid in pids]
        private = gib(sum(memory.private for memory in each))
        if private == before or NOW() > deadline:
            break
        before = private
        time.sleep(5)
    return {
        "private_gib": private,
        "shared_gib": gib(sum(memory.shared for memory in each)),
        "mapped_gib": gib(sum(memory.mapped for memory in each)),
    }


def hub(bench: Bench) -> Figures:
    """The pipeline by the family's name alone, twice."""
    hub_home, cache = bench.folder / "hub", bench.folder / "hub-cache"
    shutil.rmtree(hub_home, ignore_errors=True)
    repo = FAMILIES[bench.family].default_repo
    settings = {"HF_HOME": str(hub_home), "HF_HUB_OFFLINE": "0", "HOME": str(cache)}
    cache.mkdir(exist_ok=True)
    try:
        with HubLookalike() as served_hub:
            served_hub.add(repo, bench.checkpoint)
            settings["HF_ENDPOINT"] = served_hub.url
            first = run(bench, pipeline_command(bench), **settings)
            requests = len(served_hub.requests)
            sent = sum(request.bytes for request in served_hub.requests)
            second = run(bench, pipeline_command(bench), **settings)
            again = len(served_hub.requests) - requests
        kept = sum(path.lstat().st_size for path in hub_home.rglob("*") if path.is_file() and not path.is_symlink())
        counts = {"requests": requests, "sent_gib": gib(sent), "kept_gib": gib(kept), "requests_again": again}
        return {**counts, "first": first, "second_s": second.get("seconds")}
    finally:
        shutil.rmtree(hub_home, ignore_errors=True)
        shutil.rmtree(cache, ignore_errors=True)


def gib(size: float) -> float:
    return round(size / GIB, 2)


ACTIONS: dict[str, Callable[[Bench], Figures]] = {
    "make": make,
    "convert": convert,
    "pipeline": pipeline,
    "bigdl": served("bigdl", 1),
    "openvino": served("openvino", 1),
    "bigdl-two": served("bigdl", 2),
    "openvino-two": served("openvino", 2),
    "hub": hub,
}


def table(results: dict[str, Figures], family: str) -> str:
    """One row of Markdown under its head."""

    def cell(step: str, *names: str) -> str:
        figures = results.get(step, {})
        reason = figures.get("failed") or figures.get("refused")
        values = [str(figures[name]) for name in names if name in figures]
        return " / ".join(values) or (f"failed: {reason}" if reason else "")

    columns = {
        "family": family,
        "convert, CPU s": cell("convert", "cpu_seconds"),
        "convert, s": cell("convert", "seconds"),
        "convert, private GiB": cell("convert", "private_gib"),
        "pipeline, s": cell("pipeline", "seconds"),
        "restored, s / workers": cell("bigdl", "restored_s", "workers"),
    }
    for engine in ("bigdl", "openvino"):
        columns[f"{engine}, private / mapped GiB"] = cell(engine, "private_gib", "mapped_gib")
        columns[f"{engine}, ready s"] = cell(engine, "ready_s")
        columns[f"two {engine}, private GiB"] = cell(f"{engine}-two", "private_gib")
    lines = ([*columns], ["---"] * len(columns), [*columns.values()])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILY_NAMES)
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--keep", type=Path, help="a folder with a short path, which Ray's sockets lie in as well")
    parser.add_argument("--code", type=Path, default=ROOT, help="the tree whose nibble is measured")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started is ended then, too
    steps = given.steps.split(",")
    if unknown := set(steps) - set(STEPS):
        parser.error(f"--steps: found {', '.join(sorted(unknown))}, allowed are {', '.join(STEPS)}")
    with tempfile.TemporaryDirectory(prefix="nfs", ignore_cleanup_errors=True) as scratch:
        folder = (given.keep or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if "make" in steps and shutil.disk_usage(folder).free < NEEDED_BYTES:
            sys.exit(f"{folder}: {shutil.disk_usage(folder).free / GIB:.0f} GiB free, needed are {NEEDED_BYTES // GIB}")
        file = folder / "results.json"
        results = json.loads(file.read_text()) if file.exists() else {}
        for step in steps:
            results[step] = ACTIONS[step](Bench(given.family, folder, given.code.absolute()))
            print(step, json.dumps(results[step]), file=sys.stderr, flush=True)
            file.write_text(json.dumps(results, indent=1))
        print(table(results, given.family))


if __name__ == "__main__":
    main()
