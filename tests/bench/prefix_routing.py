"""Conversations on several replicas: routing by cost, beside Serve's power of two choices and its consistent hashing.

    python -m tests.bench.prefix_routing [--replicas 2] [--seconds 120] [--rounds 3] [--rate 0.7]

Real replicas of engine openvino, one thread each, of a generated llama of 82 million weights, and nibble's own path to
them (admission, handle, streams) in this process; what differs is the request router alone. Each router gets the same
trace in turns, in another order each round, with token ids that nobody has seen before.

A conversation begins with one of four system prompts, shared by all (the first one twice as often as the second, and so
on), and has 4.8 turns in the mean (ShareGPT); a turn adds a message and an answer whose lengths are those of the Azure
2023 conversation trace (lognormal, sigma 0.99 and 0.86) scaled to this model: medians of 40 and 19 tokens. Times to
think are exponential, 3 s in the mean. Only consistent hashing is told which conversation a request belongs to; with
--sessions, routing by cost is too.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.config import ArtifactsConfig, LimitsConfig
from cluster.families import FamilyName
from cluster.model_config import ModelConfig
from deployments.engines.openvino.batching.paged_cache import BLOCK_TOKENS
from tests.bench.make_checkpoint import write_checkpoint
from tests.random_checkpoint import Shape

FAMILY: FamilyName = "llama"
VOCABULARY, CONTEXT = 8000, 2048
SHAPE = Shape(FAMILY, layers=10, width=768, feed_forward=2048, heads=12, vocabulary=VOCABULARY)
SYSTEM_PROMPTS, SYSTEM_TOKENS = 4, 192
TURNS, MAX_TURNS = 4.8, 12
MESSAGE, ANSWER = (40, 0.99, 8, 200), (19, 0.86, 4, 80)  # median, sigma, least, most
THINK_S = 3.0
APP = "bench"


@dataclass
class Conversation:
    """`turns`: message and answer in tokens, and seconds before it."""

    begins: float
    system: int
    turns: list[tuple[int, int, float]]


@dataclass
class Tally:
    """Of one router, all rounds together. Seconds. `least`: tokens computed if each conversation stayed at one replica
    that drops nothing and each system prompt were computed once. `by_replica`: its requests."""

    requests: int = 0
    prompt_tokens: int = 0
    computed: int = 0
    least: int = 0
    by_replica: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


def lengths(drawn: random.Random, shape: tuple[float, float, int, int]) -> int:
    median, sigma, least, most = shape
    return round(min(most, max(least, median * drawn.lognormvariate(0, sigma))))


def trace(seed: int, seconds: float, rate: float) -> list[Conversation]:
    drawn, now, found = random.Random(seed), 0.0, []
    weights = [1 / (1 + index) for index in range(SYSTEM_PROMPTS)]
    while (now := now + drawn.expovariate(rate)) < seconds:
        turns = [(lengths(drawn, MESSAGE), lengths(drawn, ANSWER), 0.0)]
        while len(turns) < MAX_TURNS and drawn.random() > 1 / TURNS:
            think = drawn.expovariate(1 / THINK_S)
            turns.append((lengths(drawn, MESSAGE), lengths(drawn, ANSWER), think))
        found.append(Conversation(now, drawn.choices(range(SYSTEM_PROMPTS), weights)[0], turns))
    return found


async def run_trace(model: Any, tally: Tally, conversations: list[Conversation], salt: int, seconds: float) -> None:
    """What has not begun within so many seconds is left out."""
    drawn, started = random.Random(salt), time.monotonic()

    def new_ids(count: int) -> list[int]:
        return [drawn.randrange(300, VOCABULARY) for _ in range(count)]

    systems = [new_ids(SYSTEM_TOKENS) for _ in range(SYSTEM_PROMPTS)]
    asked: set[int] = set()

    async def converse(number: int, conversation: Conversation) -> None:
        ids = list(systems[conversation.system])
        known: int | None = None
        await asyncio.sleep(conversation.begins)
        for message, answer, think in conversation.turns:
            await asyncio.sleep(think)
            if time.monotonic() - started > seconds or len(ids) + message + answer > CONTEXT:
                return
            if known is None:
                known = len(ids) if conversation.system in asked else 0
                asked.add(conversation.system)
            ids += new_ids(message)
            tally.least += len(ids) - known // BLOCK_TOKENS * BLOCK_TOKENS
            known = len(ids) + answer - 1  # an answer's last token is computed with what comes behind it
            ids += await ask(model, tally, tuple(ids), answer, f"{salt}-{number}")

    await asyncio.gather(*(converse(number, each) for number, each in enumerate(conversations)))


async def ask(model: Any, tally: Tally, prompt: tuple[int, ...], tokens: int, session: str) -> tuple[int, ...]:
    """The ids of the answer."""
    from deployments.records import GenerationRequest, SamplingParams
    from deployments.routing.model_admission import Caller
    from deployments.routing.sequences import sequences_of

    request = GenerationRequest(
        request_id=f"{session}-{len(prompt)}", prompt=prompt, max_tokens=tokens, ignore_eos=True, session=session,
        sampling=SamplingParams(temperature=0),
    )  # fmt: skip
    began = last = time.monotonic()
    ids: tuple[int, ...] = ()
    async with aclosing(sequences_of(model, [request], Caller())) as sequences:
        while True:
            chunk = (await sequences.__anext__()).chunk
            now = time.monotonic()
            if not ids:
                tally.first.append(now - began)
            elif chunk.token_ids:
                tally.gaps.append(now - last)
            last, ids = now, ids + chunk.token_ids
            if chunk.finish_reason is not None:
                break
    tally.requests += 1
    tally.prompt_tokens += chunk.prompt_tokens
    tally.computed += chunk.prompt_tokens - chunk.cached_tokens
    return ids


def routers(sessions: bool) -> dict[str, Any]:
    """Classes by name."""
    from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
    from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

    from deployments.routing.request_router import CostRouter

    class BySession(ConsistentHashRouter):  # type: ignore[misc]  # Ray has no types
        def _routing_key(self, pending_request: Any) -> Any:
            return None if pending_request is None else pending_request.args[0].request.session

    class ByCost(CostRouter):
        def _cheapest(self, candidates: Any, asked: Any) -> Any:
            if not sessions:
                asked.routed.session = None
            return super()._cheapest(candidates, asked)

    return {"by cost": ByCost, "power of two": PowerOfTwoChoicesRequestRouter, "consistent hash": BySession}


async def model_with(router: Any, config: ModelConfig) -> Any:
    """The served model with a handle of its own that routes so, after a first answer of each replica."""
    from ray.serve.config import RequestRouterConfig
    from ray.serve.handle import DeploymentHandle

    from deployments.routing.greeting import Traffic
    from deployments.routing.serve_model import ServeModel

    RequestRouterConfig.get_request_router_class = lambda config: router
    model = ServeModel(config, Traffic())
    # Serve's own function gives one handle again and again, with one request router.
    model.use(DeploymentHandle(config.deployment, APP))
    warm = [ask(model, Tally(), tuple(range(300, 340 + index)), 4, f"warm {index}") for index in range(8)]
    await asyncio.gather(*warm)
    assert isinstance(model._handle._router._asyncio_router.request_router, router)
    return model


async def compare(given: argparse.Namespace, config: ModelConfig) -> dict[str, Tally]:
    classes = routers(given.sessions)
    models = {name: await model_with(router, config) for name, router in classes.items()}
    tallies = {name: Tally() for name in classes}
    for number in range(given.rounds):
        conversations = trace(number, given.seconds, given.rate)
        order = list(classes)[number % len(classes) :] + list(classes)[: number % len(classes)]
        for name in order:
            salt = given.salt + 10 * number + list(classes).index(name)
            before = await requests_by_replica(models)
            await run_trace(models[name], tallies[name], conversations, salt, given.seconds)
            tallies[name].by_replica += await requests_by_replica(models) - before
            report({name: tallies[name]})  # so far
    return tallies


async def requests_by_replica(models: dict[str, Any]) -> Counter[str]:
    stats = await models["by cost"].replica_stats(10)  # the others' request routers do not note which ones there are
    return Counter({replica: info["requests"] for replica, info in stats.items()})


def report(tallies: dict[str, Tally]) -> None:
    for name, tally in tallies.items():
        first, gaps = (statistics.quantiles(each, n=100) for each in (tally.first, tally.gaps))
        print(
            f"| {name} | {tally.requests} | {max(tally.by_replica.values()) / tally.requests:.2f} |"
            f" {tally.prompt_tokens} | {tally.computed} | {tally.computed / tally.prompt_tokens:.2f} |"
            f" {tally.least / tally.prompt_tokens:.2f} |"
            f" {first[49] * 1e3:.0f} / {first[89] * 1e3:.0f} | {gaps[49] * 1e3:.1f} / {gaps[98] * 1e3:.0f} |",
            flush=True,
        )


@contextmanager
def replicas(folder: Path, count: int) -> Iterator[ModelConfig]:
    """Of a new cluster, without proxies."""
    os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "0"
    from cluster.ray_cluster import local_cluster

    with local_cluster(count + 1):
        from ray import serve

        from deployments.app import addressed, model_application

        config = ModelConfig.model_validate(
            {
                "name": "model", "family": FAMILY, "checkpoint": str(folder / "checkpoint"), "engine": "openvino",
                "threads": 1, "context": CONTEXT, "replicas": {"min": count, "max": count},
            }
        )  # fmt: skip
        artifacts = ArtifactsConfig(cache_dir=folder / "cache")
        (wanted,) = addressed([config], artifacts)
        serve.start(proxy_location="Disabled")
        serve.run(model_application(config, wanted, artifacts, LimitsConfig()), name=APP, route_prefix=None)
        yield config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers: dict[str, tuple[Callable[[str], Any], Any]] = {
        "replicas": (int, 2), "seconds": (float, 120), "rounds": (int, 3), "rate": (float, 0.7), "salt": (int, 1000),
    }  # fmt: skip
    for name, (kind, default) in numbers.items():
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--sessions", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nibble-bench") as name:
        write_checkpoint(Path(name) / "checkpoint", SHAPE, files=1)
        with replicas(Path(name), given.replicas) as config:
            tallies = asyncio.run(compare(given, config))
            print(
                "| router | requests | at the busiest replica | prompt tokens | computed | part | least part |"
                " first token p50 / p90 ms | gap p50 / p99 ms |"
            )
            print("|---|---|---|---|---|---|---|---|---|")
            report(tallies)


if __name__ == "__main__":
    main()
