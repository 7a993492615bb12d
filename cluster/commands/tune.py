"""`nibble tune`: which split of a node's cores among a model's replicas is the best, and writing it into the config."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

from cluster.config import load_config
from cluster.conversion.local import convert_to_cache
from cluster.conversion.wanted import wanted_artifacts
from cluster.display import ConversionDisplay
from cluster.errors import ConfigError
from cluster.machine.isa import available_cores
from cluster.model_config import ModelConfig
from deployments.engines.measure import EngineLoad
from deployments.engines.splits import Result, splits, try_split


def tune(path: Path, name: str | None, load: EngineLoad, rounds: int, write: bool, console: Console) -> None:
    """Raises ConfigError for a model that the config has not, and what converting or loading it raises."""
    config = load_config(path)
    model = _named(path, config.models, name)
    with ExitStack() as stack:
        with ConversionDisplay(console) as display:
            artifacts = [convert_to_cache(wanted, config.artifacts, display) for wanted in wanted_artifacts(model)]
        for artifact in artifacts:
            stack.callback(artifact.release)
        best = fastest_split(model, [artifact.folder for artifact in artifacts], load, rounds, console)
    if write:
        write_split(path, model.name, best)
        console.print(f"written to {path}: threads and replicas of {model.name}")


def fastest_split(
    model: ModelConfig, folders: Sequence[Path], load: EngineLoad, rounds: int, console: Console
) -> Result:
    """The one with the most tokens/s, and a table of all. Raises as try_split does."""
    cores = sorted(os.sched_getaffinity(0))[: available_cores()]
    console.print(
        f"{model.name} on {model.engine}, {len(cores)} cores: {load.concurrency} clients,"
        f" {load.input_tokens} tokens in, {load.output_tokens} out, medians of {rounds} rounds"
    )
    table = Table("replicas x threads", "tokens/s", "first token, ms", "each later token, ms")
    results = []
    for split in splits(len(cores)):
        results.append(result := try_split(folders, model, split, cores, load, rounds))
        numbers = (f"{result.tokens_per_s:.1f}", f"{result.ttft_ms:.0f}", f"{result.tpot_ms:.1f}")
        table.add_row(f"{split.replicas} x {split.threads}", *numbers)
    console.print(table)
    best = max(results, key=lambda result: result.tokens_per_s)
    console.print(f"most tokens/s: replicas {best.split.replicas}, threads {best.split.threads}")
    return best


def _named(path: Path, models: tuple[ModelConfig, ...], name: str | None) -> ModelConfig:
    found = [model for model in models if name in (None, model.name)]
    if len(found) != 1:
        names = ", ".join(model.name for model in models)
        raise ConfigError(f"{path}: models: found {name or 'no name given'}, allowed is one of {names}")
    return found[0]


def write_split(path: Path, name: str, best: Result) -> None:
    """Sets `threads` and `replicas` of a model in a YAML file, whose comments and order stay as they are."""
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    values = yaml.load(path.read_text("utf-8"))
    model = next(model for model in values["models"] if model["name"] == name)
    model["threads"] = best.split.threads
    replicas = model.setdefault("replicas", {})
    replicas["min"] = best.split.replicas
    replicas["max"] = max(best.split.replicas, replicas.get("max", 1))
    beside = path.with_suffix(".new")
    with beside.open("w", encoding="utf-8") as file:
        yaml.dump(values, file)
    beside.replace(path)
