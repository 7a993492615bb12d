"""Who is faster on this machine: nibble with an engine over HTTP and gRPC, that engine in this process with no serving
layer, bigdl-llm as its users run it, and llama-server.

    python -m tests.bench.compare CHECKPOINT [--family llama] [--engine openvino] [--concurrency 1,4,8,16] [--rate 0.5]
                                  [--rounds 3] [--llama-server BINARY --gguf FILE] [--reference-python PYTHON]
                                  [--json FILE]

All run on the same weights with the same number of threads and take turns, round by round; no prompt is sent twice.
The table has medians over the rounds, and ratios of runs that were next to each other. PYTHON is an interpreter with
torch and bigdl-llm==2.4.0; FILE the checkpoint in llama.cpp's format, Q4_0. Without them these are left out.
CHECKPOINT is, for instance, one of tests.bench.make_checkpoint.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from cluster.artifacts.manifest import Manifest
from cluster.bench.figures import Level, levels_of, ratios, spreads
from cluster.bench.grpc_client import GrpcClient
from cluster.bench.http_client import HttpClient
from cluster.bench.load_records import Client, Load, LoadSettings, Server
from cluster.bench.prompts import TOKEN_PROMPTS, token_prompts
from cluster.bench.results import results
from cluster.bench.runner import Bench
from cluster.commands.bench import loads_of
from cluster.config import ArtifactsConfig
from cluster.conversion.local import convert_to_cache
from cluster.conversion.wanted import wanted_artifacts
from cluster.display import ConversionDisplay
from cluster.ray_cluster import free_ports
from deployments.engines.loading import ENVIRONMENT, load_engine
from tests.bench.compare_clients import EngineClient, UpstreamClient
from tests.bench.serving import CONTEXT, NOW, model_of, run_with, running, serving, workload_parser

CONCURRENCY = "1,4,8,16"
SLOTS = 8  # of llama-server, at least


class System(NamedTuple):
    """`url`: its scheme tells what fields a request may have."""

    url: str
    client: Callable[[], Client]


def systems(given: argparse.Namespace, stack: ExitStack, scratch: Path) -> dict[str, System]:
    """What is compared, by name, the engine in this process first; servers are started."""
    model = model_of(given, given.engine)
    with ConversionDisplay(Console(stderr=True)) as display:
        (artifact,) = [convert_to_cache(wanted, ArtifactsConfig(), display) for wanted in wanted_artifacts(model)]
    stack.callback(artifact.release)
    engine = load_engine(model, [artifact.folder], None)
    stack.callback(engine.close)
    served, count = stack.enter_context(serving(model, scratch)), given.output_tokens
    found = {
        f"{given.engine}, in-process": System("engine://", lambda: EngineClient(engine, count)),
        f"{given.engine}, HTTP": System(served.http, lambda: HttpClient(served.http, "model", count, None, NOW)),
        f"{given.engine}, gRPC": System(served.grpc, lambda: GrpcClient(served.grpc, "model", count, None, NOW)),
    }
    if given.reference_python:
        binary = artifact.folder / Manifest.read(artifact.folder).binary
        upstream = partial(UpstreamClient, given.reference_python, binary, given.family, given.threads, count)
        found["bigdl-llm upstream"] = System("process://", upstream)
    if given.llama_server:
        slots = max(SLOTS, *(int(load.value) for load in loads(given) if load.kind == "concurrency"))
        (port,) = free_ports(1)
        command = [given.llama_server, "-m", given.gguf, "-t", str(given.threads), "-c", str(CONTEXT * slots)]
        command += ["-np", str(slots), "--host", "127.0.0.1", "--port", str(port)]
        url = f"http://127.0.0.1:{port}"
        stack.enter_context(running(command, f"{url}/health", scratch / "llama.log"))
        found["llama-server"] = System(url, lambda: HttpClient(url, "model", count, None, NOW))
    return found


def loads(given: argparse.Namespace) -> tuple[Load, ...]:
    """Closed loops unless only rates are given."""
    return loads_of(given.concurrency or (None if given.rate else CONCURRENCY), given.rate)


def settings_of(given: argparse.Namespace, compared: dict[str, System]) -> LoadSettings:
    return LoadSettings(
        servers=tuple(Server(name, system.url, "model") for name, system in compared.items()),
        baseline=0,
        loads=loads(given),
        prompts=TOKEN_PROMPTS,
        input_tokens=given.input_tokens,
        output_tokens=given.output_tokens,
        requests=None,
        duration_s=None,
        rounds=given.rounds,
        warmup=2,
        time_limit_s=600,
        seed=given.seed,
    )


def table_of(level: Level, settings: LoadSettings, input_tokens: int) -> Table:
    """Tokens/s in all are those of prompts and completions together."""
    names = [server.label for server in settings.servers]
    rival = names.index("llama-server") if "llama-server" in names else None
    columns = ["tokens/s out", "in all", "first token, ms", "each later one, ms", "/ in-process"]
    table = Table(str(level.load), *columns, *(["/ llama-server"] if rival is not None else []))
    for name, runs in zip(names, level.runs, strict=True):
        figures = {figure: spread.median for figure, spread in spreads(runs).items()}
        out, requests = figures["output_tokens_per_s"], figures["requests_per_s"]
        row = [f"{out:.1f}", f"{out + requests * input_tokens:.0f}", f"{1000 * figures['ttft_p50_s']:.0f}"]
        row.append(f"{1000 * figures.get('tpot_p50_s', 0):.1f}")
        for base in (0, rival):
            if base is not None:
                row.append(f"{ratios(runs, level.runs[base])['output_tokens_per_s'].median:.2f}")
        table.add_row(name, *row)
    return table


def main() -> None:
    parser = workload_parser(__doc__)
    parser.add_argument("--engine", default="openvino")
    parser.add_argument("--concurrency", help=f"closed loops; {CONCURRENCY} where no rate is given")
    parser.add_argument("--rate", help="open loops, requests/s: what serving adds to the first token")
    parser.add_argument("--llama-server", metavar="BINARY")
    parser.add_argument("--gguf", metavar="FILE")
    parser.add_argument("--reference-python", metavar="PYTHON")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    run_with(ENVIRONMENT[given.engine], "tests.bench.compare")  # for the engine in this process; a replica gets it too
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        compared = systems(given, stack, scratch)
        settings, clients = settings_of(given, compared), [system.client for system in compared.values()]
        prompts = token_prompts(given.seed, given.input_tokens, given.vocabulary)
        bench = Bench(settings, lambda place: clients[place](), prompts, Console(stderr=True).print)
        asyncio.run(bench.measure())
    if given.json:
        given.json.write_text(json.dumps(results(bench.runs, settings, raw=False), indent=1) + "\n")
    for level in levels_of(bench.runs, settings):
        Console(width=140).print(table_of(level, settings, given.input_tokens))


if __name__ == "__main__":
    main()
