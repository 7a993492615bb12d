"""`nibble bench`: measures servers under load, shows the tables, writes JSON and plots."""

from __future__ import annotations

import asyncio
import json
import math
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

from rich.console import Console

from cluster.bench.figures import levels_of
from cluster.bench.load_records import Client, Load, LoadSettings, Now, Prompt, Server
from cluster.bench.plot import check_plot, plot
from cluster.bench.prompts import TOKEN_PROMPTS, WORD_PROMPTS, file_prompts, token_prompts, word_prompts
from cluster.bench.report import show
from cluster.bench.results import results
from cluster.bench.runner import Bench, SystemClock
from cluster.errors import ConfigError
from deployments.client import API_KEY_VARIABLE, checked_url

COMPARE_KEY_VARIABLE = "NIBBLE_COMPARE_API_KEY"
DEFAULT_CONCURRENCY = "1,4,8,16"


@dataclass(frozen=True)
class Options:
    """The command line's; None where one was not given. URLs have their scheme."""

    model: str
    urls: Sequence[str]
    compare: str | None
    compare_model: str | None
    concurrency: str | None
    rate: str | None
    input_tokens: int
    output_tokens: int
    requests: int | None
    duration: float | None
    rounds: int
    warmup: int
    time_limit: float
    seed: int | None
    vocabulary: int
    text_prompts: bool
    prompt_file: Path | None
    json: Path | None
    raw: bool
    plots: Sequence[Path]


def bench(options: Options, console: Console) -> None:
    """Whatever ends it, Ctrl-C too: what was measured until then is shown and written."""
    settings = settings_of(options)
    check_outputs(options)
    clock = SystemClock()
    prompts = prompts_of(options, settings.seed)
    measured = Bench(settings, lambda place: client_of(place, settings, clock.now), prompts, console.print, clock)
    try:
        asyncio.run(measured.measure())
    finally:
        if measured.runs:
            show(measured.runs, settings, console)
            write(measured, options)


def write(measured: Bench, options: Options) -> None:
    if options.json:
        found = results(measured.runs, measured.settings, options.raw)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    for file in options.plots:
        plot(levels_of(measured.runs, measured.settings), measured.settings, file)


def client_of(place: int, settings: LoadSettings, now: Now) -> Client:
    server, key = settings.servers[place], os.environ.get(API_KEY_VARIABLE)
    if place == settings.baseline:
        key = os.environ.get(COMPARE_KEY_VARIABLE, key)
    if server.url.startswith("http"):
        from cluster.bench.http_client import HttpClient

        return HttpClient(server.url, server.model, settings.output_tokens, key, now)
    from cluster.bench.grpc_client import GrpcClient

    return GrpcClient(server.url, server.model, settings.output_tokens, key, now)


def settings_of(options: Options) -> LoadSettings:
    """Raises ConfigError, naming the option."""
    urls = [*options.urls, *([options.compare] if options.compare else [])]
    models = [options.model] * len(options.urls) + [options.compare_model or options.model]
    if options.compare_model is not None and options.compare is None:
        raise ConfigError("compare-model: found without --compare, whose model it names; give both")
    if len(urls) > len(ascii_uppercase):
        raise ConfigError(f"url: found {len(urls)} servers, allowed are {len(ascii_uppercase)}")
    return LoadSettings(
        servers=tuple(
            Server(label, checked_url(url), model)
            for label, url, model in zip(ascii_uppercase, urls, models, strict=False)
        ),
        baseline=len(options.urls) if options.compare else None,
        loads=loads_of(options.concurrency, options.rate),
        prompts=kind_of_prompts(options),
        input_tokens=options.input_tokens,
        output_tokens=options.output_tokens,
        requests=options.requests,
        duration_s=options.duration,
        rounds=options.rounds,
        warmup=options.warmup,
        time_limit_s=options.time_limit,
        # By default never the same: a server may still have the last benchmark's prompts in its cache.
        seed=secrets.randbits(32) if options.seed is None else options.seed,
    )


def kind_of_prompts(options: Options) -> str:
    if options.text_prompts and options.prompt_file:
        raise ConfigError("text-prompts: found together with --prompt-file; give one of them")
    if options.prompt_file:
        return f"lines of {options.prompt_file}"
    return WORD_PROMPTS if options.text_prompts else TOKEN_PROMPTS


def prompts_of(options: Options, seed: int) -> Iterator[Prompt]:
    if options.prompt_file:
        return file_prompts(seed, options.prompt_file)
    if options.text_prompts:
        return word_prompts(seed, options.input_tokens)
    return token_prompts(seed, options.input_tokens, options.vocabulary)


def loads_of(concurrency: str | None, rate: str | None) -> tuple[Load, ...]:
    """Closed loops unless only a rate is given, each load once. Raises ConfigError for what is no list of numbers."""
    if concurrency is None and rate is None:
        concurrency = DEFAULT_CONCURRENCY
    workers = [Load("concurrency", value) for value in numbers("concurrency", concurrency, whole=True)]
    rates = [Load("rate", value) for value in numbers("rate", rate, whole=False)]
    return tuple(dict.fromkeys([*workers, *rates]))


def numbers(option: str, text: str | None, whole: bool) -> list[float]:
    try:
        found = [float(each) for each in text.split(",")] if text is not None else []
        if not all(0 < each < math.inf and (each == int(each) or not whole) for each in found):
            raise ValueError
    except ValueError:
        allowed = "whole numbers from 1, such as 1,4,8" if whole else "numbers above 0, such as 0.5,2"
        raise ConfigError(f"{option}: found {text!r}, allowed are {allowed}") from None
    return found


def check_outputs(options: Options) -> None:
    """Before anything is measured. Raises ConfigError where a result could not be written."""
    if options.raw and options.json is None:
        raise ConfigError("raw: found without --json, to which it adds every request; give both")
    for option, files in (("json", [options.json] if options.json else []), ("plot", options.plots)):
        for file in files:
            if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
                raise ConfigError(f"{option}: {file} cannot be written; give a file in a folder that can")
    for file in options.plots:
        check_plot(file)
