"""Settings, runs and replies for the tests of `cluster/bench/`."""

from __future__ import annotations

from typing import Any

from cluster.bench.load_records import Ending, Failure, Load, LoadSettings, Reply, Run, Sent, Server

CLOSED = Load("concurrency", 2)
OPEN = Load("rate", 4)
FULL = Failure("HTTP 429", "queue full")


def settings_for(*urls: str, **changes: Any) -> LoadSettings:
    servers = tuple(Server(label, url, "m") for label, url in zip("ABC", urls, strict=False))
    values: dict[str, Any] = {
        "servers": servers,
        "baseline": len(servers) - 1 if len(servers) > 1 else None,
        "loads": (CLOSED,),
        "prompts": "token ids",
        "input_tokens": 4,
        "output_tokens": 3,
        "requests": 6,
        "duration_s": None,
        "rounds": 2,
        "warmup": 2,
        "time_limit_s": 60.0,
        "seed": 7,
    }
    return LoadSettings(**(values | changes))


def sent(*chunks: float, due: float = 0.0, end: float | None = None, tokens: int | None = None) -> Sent:
    return Sent(due, due, Reply(chunks, chunks[-1] if end is None else end, 4, tokens))


def failed(due: float = 0.0, failure: Failure = FULL) -> Sent:
    return Sent(due, due, Reply((), due, failure=failure))


def run_of(
    *requests: Sent,
    server: int = 0,
    load: Load = CLOSED,
    round: int = 0,
    seconds: float = 2.0,
    ending: Ending = "whole",
) -> Run:
    return Run(server, load, round, "2026-01-01T00:00:00+00:00", seconds, 0.003, requests, ending)
