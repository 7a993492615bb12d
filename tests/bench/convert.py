"""nibble's conversion beside bigdl-llm's llm_convert, in one run on one machine.

    python -m tests.bench.convert CHECKPOINT [--family llama] [--workers 1 2] [--rounds 1]
                                  [--reference-python PYTHON] [--reference-path FOLDER] [--scratch FOLDER]

CHECKPOINT is a folder of safetensors, for instance one of tests.bench.make_checkpoint. Measured are `nibble convert` as
a user runs it (on this machine without Ray, from start to end of the process, the result checked and written), the way
to the published artifact in a cluster that runs already (checked, and kept in the node cache), and its tasks alone,
with each number of workers. A task's result lies in Ray's object store; it is shown beside what its process took
besides. "Not of files" is memory without the pages of files, which the kernel could drop: the check of nibble's result,
which llm_convert has not, maps the whole of it. PYTHON is an interpreter with
torch, transformers 4 and bigdl-llm==2.4.0, FOLDER goes to its PYTHONPATH; without it llm_convert is left out. What it
needs in another form (llama as pytorch_model.bin) is prepared before its time starts. Every file is read once before
each run.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.config import ArtifactsConfig
from cluster.conversion.plan import ConversionPlan, plan_conversion
from cluster.families import FAMILY_NAMES, FamilyName
from tests.bench.measured import Measured, measure, read_once

ROOT = Path(__file__).parents[2]
TASK_TITLE = "ray::shard_task"

PREPARE = """
import json, shutil, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
source, target = Path(sys.argv[1]), Path(sys.argv[2])
weights = {}
for path in sorted(source.glob("*.safetensors")):
    weights |= load_file(path)
if json.loads((source / "config.json").read_text()).get("tie_word_embeddings") and "lm_head.weight" not in weights:
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
target.mkdir()
torch.save(weights, target / "pytorch_model.bin")
for path in source.iterdir():
    if "safetensors" not in path.name:
        shutil.copy(path, target)
"""

REFERENCE = """
import sys
from bigdl.llm import llm_convert
llm_convert(sys.argv[1], sys.argv[2], model_format="pth", model_family=sys.argv[3], outtype="int4")
"""


def nibble_convert(checkpoint: Path, family: FamilyName, output: Path, environment: dict[str, str]) -> Measured:
    command = [sys.executable, "-m", "cluster.cli", "convert", str(checkpoint), "--family", family]
    return measure([*command, "--output", str(output)], environment, ROOT, TASK_TITLE)


def nibble_inside(
    what: str, checkpoint: Path, family: FamilyName, workers: int, shard_bytes: int, environment: dict[str, str]
) -> Measured:
    """A part of the conversion in a cluster that runs already: the seconds are those of the part alone."""
    command = [sys.executable, "-m", "tests.bench.convert", str(checkpoint), "--family", family]
    inside = ["--inside", what, "--workers", str(workers), "--shard-size", str(shard_bytes)]
    measured = measure([*command, *inside], environment, ROOT, TASK_TITLE)
    measured.seconds = float(measured.output.split()[-1])
    return measured


def run_inside(what: str, checkpoint: Path, family: FamilyName, workers: int, shard_bytes: int) -> float:
    """Seconds from asking to the end. `tasks`: the shards' tasks alone; `ensure`: everything between a checkpoint and
    its published artifact (digest, plan, shards, assembly in the node cache, check). The workers run already."""
    import ray

    from cluster.artifact_store import store_handle
    from cluster.conversion.wanted import Wanted
    from cluster.conversion_tasks import shard_task
    from cluster.ray_cluster import local_cluster

    plan = plan_conversion(checkpoint, family, shard_bytes=shard_bytes)
    with local_cluster(workers):
        # As many small ones at once, so that every worker has its library and its imports.
        small = plan_conversion(checkpoint, family, shard_bytes=1)
        last = len(small.shards) - 1  # a norm of a few bytes in most families
        ray.get([entry for _, entry in (shard_task.remote(small, last) for _ in range(4 * workers))])
        store = store_handle()
        ray.get(store.manifests.remote())
        plan_ref, started = ray.put(plan), time.perf_counter()
        if what == "tasks":
            ray.get([shard_task.remote(plan_ref, shard.index)[1] for shard in plan.shards])
        else:
            wanted = Wanted(source=str(checkpoint), family=family, quantization="q4_0")
            ray.get(store.ensure.remote(wanted, ArtifactsConfig(shard_size=shard_bytes)))
        return time.perf_counter() - started


def reference_convert(
    checkpoint: Path, family: FamilyName, output: Path, python: str, environment: dict[str, str]
) -> Measured:
    output.mkdir()
    return measure([python, "-c", REFERENCE, str(checkpoint), str(output), family], environment, ROOT, python)


def prepared(checkpoint: Path, family: FamilyName, scratch: Path, python: str, environment: dict[str, str]) -> Path:
    if family != "llama":
        return checkpoint
    target = scratch / "as-pytorch-model-bin"
    subprocess.run([python, "-c", PREPARE, str(checkpoint), str(target)], env=environment, check=True)
    return target


def sha256_of(folder: Path) -> str:
    (binary,) = folder.glob("bigdl_llm_*.bin")
    return hashlib.sha256(binary.read_bytes()).hexdigest()


def shard_half_bytes(plan: ConversionPlan) -> int:
    """fp16 bytes of the largest shard's weights."""
    sizes = []
    for shard in plan.shards:
        tensors = plan.tensors[shard.first : shard.stop]
        sizes.append(sum(2 * tensor.shape[0] * tensor.source.row_weights for tensor in tensors))
    return max(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--family", choices=FAMILY_NAMES, default="llama")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    size = ArtifactsConfig().shard_size
    parser.add_argument("--shard-size", type=int, default=int(size), help=f"of the tasks alone, bytes; default {size}")
    parser.add_argument("--rounds", type=int, default=1, help="the best of this many runs is shown")
    parser.add_argument("--reference-python", metavar="PYTHON")
    parser.add_argument("--reference-path", metavar="FOLDER", default="")
    parser.add_argument("--scratch", type=Path, help="a folder with room for the outputs and llm_convert's copy")
    parser.add_argument("--inside", choices=("tasks", "ensure"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    checkpoint = given.checkpoint.absolute()
    if given.inside:
        print(run_inside(given.inside, checkpoint, given.family, given.workers[0], given.shard_size))
        return
    with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
        compare(checkpoint, given, Path(folder))


def compare(checkpoint: Path, given: argparse.Namespace, scratch: Path) -> None:
    started = time.perf_counter()
    plan = plan_conversion(checkpoint, given.family, shard_bytes=given.shard_size)
    planning = time.perf_counter() - started
    table = Table(
        "", "seconds", "peak memory, all", "not of files", "one task + its result", "of its fp16", "written to disk"
    )
    table.title = (
        f"{plan.family}, {plan.bytes / 1e6:.0f} MB of INT4, planned in {planning:.2f} s, {os.cpu_count()} cores"
    )

    def add(name: str, runs: list[Measured], shards: ConversionPlan | None) -> Measured:
        best = min(runs, key=lambda run: run.seconds)
        largest = ("", "")
        if shards is not None:
            chunk = max(shard.bytes for shard in shards.shards)
            needed = (best.largest + chunk) / shard_half_bytes(shards)
            largest = (f"{best.largest / 1e6:.0f} + {chunk / 1e6:.0f} MB", f"{needed:.2f}")
            name = f"{name}, {len(shards.shards)} shards"
        row = (
            f"{best.seconds:.1f}",
            f"{best.peak / 1e6:.0f} MB",
            f"{best.private / 1e6:.0f} MB",
            *largest,
            f"{best.written / 1e6:.0f} MB",
        )
        table.add_row(name, *row)
        return best

    def environment(number: int | str) -> dict[str, str]:
        """A home of its own for each run: nothing is found in a node cache."""
        home = scratch / f"home-{number}"
        home.mkdir()
        return {**os.environ, "HOME": str(home), "HF_HUB_OFFLINE": "1"}

    runs, outputs = [], [scratch / f"nibble-{number}" for number in range(given.rounds)]
    for number, output in enumerate(outputs):
        read_once(checkpoint)
        runs.append(nibble_convert(checkpoint, given.family, output, environment(number)))
    nibble = add("nibble convert", runs, None)
    for what, name in (("ensure", "published in a running cluster"), ("tasks", "the shards' tasks alone")):
        for workers in given.workers:
            runs = []
            for number in range(given.rounds):
                read_once(checkpoint)
                home = environment(f"{what}-{workers}-{number}")
                runs.append(nibble_inside(what, checkpoint, given.family, workers, given.shard_size, home))
            add(f"{name}, {workers} CPU", runs, plan)
    if given.reference_python:
        python, home = given.reference_python, environment(2000) | {"PYTHONPATH": given.reference_path}
        source = prepared(checkpoint, given.family, scratch, python, home)
        runs = []
        for number in range(given.rounds):
            read_once(source)
            runs.append(reference_convert(source, given.family, scratch / f"llm-{number}", python, home))
        theirs = add("llm_convert", runs, None)
        same = sha256_of(scratch / "llm-0") == sha256_of(outputs[0])
        ratios = [getattr(theirs, each) / getattr(nibble, each) for each in ("seconds", "peak", "private", "written")]
        compared = "llm_convert / nibble convert: {:.1f}x time, {:.1f}x memory ({:.1f}x not of files), {:.1f}x written"
        table.caption = compared.format(*ratios)
        table.caption += f"; the two binaries are {'the same' if same else 'DIFFERENT'}"
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
