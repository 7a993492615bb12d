"""What a benchmark found, as JSON: everything that is needed to judge it later, the machine included."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from cluster.bench.figures import Level, Spread, counted_by, errors_of, figures_of, levels_of, ratios, spreads
from cluster.bench.load_records import LoadSettings, Run, Sent
from cluster.machine.isa import available_cores

FORMAT = 1
PACKAGES = ("nibble-serve", "grpcio", "protobuf")


def results(runs: list[Run], settings: LoadSettings, raw: bool) -> dict[str, Any]:
    """Times are seconds. `raw`: with every request, its times counted from the start of its run."""
    return {
        "format": FORMAT,
        "written": datetime.now(timezone.utc).isoformat(),
        "machine": machine(),
        "versions": versions(),
        "settings": asdict(settings),
        "levels": [level_object(level, settings, raw) for level in levels_of(runs, settings)],
    }


def machine() -> dict[str, Any]:
    """Where the load generator runs; a server elsewhere does not tell its own."""
    return {
        "cpu": cpu_model(Path("/proc/cpuinfo").read_text()),
        "cores": os.cpu_count(),
        "cores_available": available_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "load_average": os.getloadavg(),
    }


def cpu_model(cpuinfo: str) -> str:
    names = (line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name"))
    return next(names, "unknown")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def level_object(level: Level, settings: LoadSettings, raw: bool) -> dict[str, Any]:
    baseline = None if settings.baseline is None else level.runs[settings.baseline]
    return {
        "load": asdict(level.load),
        "servers": [
            {
                "label": server.label,
                "figures": spread_objects(spreads(runs)),
                "tokens_counted_by": counted_by(runs),
                "errors": dict(errors_of(runs)),
                "ratios": None if baseline is None or baseline is runs else spread_objects(ratios(runs, baseline)),
                "rounds": [run_object(run, raw) for run in runs],
            }
            for server, runs in zip(settings.servers, level.runs, strict=True)
        ],
    }


def run_object(run: Run, raw: bool) -> dict[str, Any]:
    found = {
        "round": run.round,
        "started": run.started,
        "seconds": run.seconds,
        "ending": run.ending,
        "requests_sent": len(run.requests),
        "requests_succeeded": len(run.succeeded),
        "errors": dict(errors_of([run])),
        "figures": figures_of(run),
    }
    return found | {"requests": request_objects(run.requests)} if raw else found


def request_objects(requests: Iterable[Sent]) -> list[dict[str, Any]]:
    return [asdict(sent) | {"output_tokens": sent.tokens} for sent in requests]


def spread_objects(spreads: dict[str, Spread]) -> dict[str, dict[str, float]]:
    return {name: asdict(spread) for name, spread in spreads.items()}
