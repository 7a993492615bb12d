"""A server under three times the load that it can serve: what of it is served, how it is shared, what is told to those
who are refused.

    python -m tests.bench.overload [--seconds 120] [--times 3] [--leave 0.5]

It starts `nibble serve` of the built-in llama with two API keys. First a closed loop of one key measures the capacity.
Then both keys ask in an open loop (Poisson), the heavy one five times as often; a part of the clients leaves early. Who
is refused comes back once, after the seconds of Retry-After. At last, so that the light key has always work too, the
load is half as much again and nobody leaves, for half of the time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field

import httpx

from cluster.ray_cluster import free_ports
from deployments.api.access import hash_of
from tests.bench.measured import memory_of
from tests.integration.processes import Served, replicas, sandbox, serving

CAPACITY_CLIENTS, CAPACITY_S = 8, 15.0
MAX_TOKENS = 200
SHARES = {"heavy": 5.0, "light": 1.0}
# The first seconds, in which the queue fills, and the last ones, in which the keys may run out of work, are left out.
MARGIN_S = 20.0
SHORTEST_WAIT_S = 0.5  # shorter ones count as so much, since Retry-After has whole seconds


@dataclass
class Outcome:
    """One try: `kind` is done, refused, left or failed. Seconds since the beginning."""

    kind: str
    came: float
    ended: float
    first: float | None = None
    tokens: int = 0
    retry_after: int = 0


@dataclass
class Tally:
    outcomes: dict[str, list[Outcome]] = field(default_factory=lambda: defaultdict(list))  # by key
    retries: list[tuple[Outcome, Outcome]] = field(
        default_factory=list
    )  # what was refused, and what came of coming back
    memory: list[tuple[float, int]] = field(default_factory=list)  # bytes of the router's own


class Client:
    def __init__(self, url: str, started: float) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None))
        self._started = started
        self._count = 0

    def now(self) -> float:
        return time.monotonic() - self._started

    async def ask(self, key: str, patience: float | None) -> Outcome:
        """A client without `patience` leaves when it is over, wherever it stands then."""
        outcome = Outcome("left", self.now(), 0.0)
        try:
            await asyncio.wait_for(self._stream(key, outcome), patience)
        except asyncio.TimeoutError:
            pass
        except httpx.HTTPError as error:
            outcome.kind = f"failed: {error!r}"
        outcome.ended = self.now()
        return outcome

    async def _stream(self, key: str, outcome: Outcome) -> None:
        self._count += 1
        body = {"model": "llama", "prompt": f"{self._count} Q: What is CPU? A:", "max_tokens": MAX_TOKENS}
        body |= {"stream": True, "temperature": 2.0, "seed": self._count, "ignore_eos": True}
        headers = {"Authorization": f"Bearer nbl-{key}"}
        async with self._http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            if answer.status_code == 429:
                outcome.kind, outcome.retry_after = "refused", int(answer.headers["Retry-After"])
                return
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                outcome.first = outcome.first or self.now()
                event = json.loads(line[6:])
                if "error" in event:  # it had waited, and gave its place to another key
                    outcome.kind = "displaced"
                    return
                outcome.tokens += 1
            outcome.kind = "done"


def router_pid(served: Served) -> int:
    (router,) = replicas(served.sandbox, "router")
    return router


async def capacity(client: Client) -> float:
    """Events (tokens but a few) a second of a closed loop."""
    until, tokens = client.now() + CAPACITY_S, 0

    async def loop() -> None:
        nonlocal tokens
        while client.now() < until:
            outcome = await client.ask("heavy", None)
            tokens += outcome.tokens

    begun = client.now()
    await asyncio.gather(*(loop() for _ in range(CAPACITY_CLIENTS)))
    return tokens / (client.now() - begun)


async def overload(client: Client, served: Served, rate: float, seconds: float, leave: float, patience: float) -> Tally:
    tally, begun, pid = Tally(), client.now(), router_pid(served)
    drawn = random.Random(0)

    async def one(key: str, limit: float | None) -> None:
        outcome = await client.ask(key, limit)
        tally.outcomes[key].append(outcome)
        if outcome.kind == "refused":
            await asyncio.sleep(outcome.retry_after)
            again = await client.ask(key, None)
            tally.outcomes[key].append(again)
            tally.retries.append((outcome, again))

    async def watch() -> None:
        while True:
            tally.memory.append((client.now() - begun, memory_of(pid).private))
            await asyncio.sleep(5)

    watching, asked = asyncio.ensure_future(watch()), []
    while client.now() - begun < seconds:
        await asyncio.sleep(drawn.expovariate(rate))
        (key,) = drawn.choices(list(SHARES), list(SHARES.values()))
        limit = drawn.uniform(0, patience) if drawn.random() < leave else None
        asked.append(asyncio.ensure_future(one(key, limit)))
    measured_until = client.now()
    for task in asked:  # what is left then would tell of another load
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    watching.cancel()
    for outcomes in tally.outcomes.values():
        outcomes[:] = [each for each in outcomes if begun + MARGIN_S <= each.ended <= measured_until]
    return tally


def report(tally: Tally, tokens_a_second: float, seconds: float) -> None:
    span = seconds - MARGIN_S
    done = {key: sum(o.tokens for o in all_ if o.kind == "done") for key, all_ in tally.outcomes.items()}
    given = {key: sum(o.tokens for o in all_) for key, all_ in tally.outcomes.items()}
    goodput = sum(done.values()) / span
    print(f"capacity {tokens_a_second:.0f} tokens/s, goodput {goodput:.0f} ({goodput / tokens_a_second:.2f} of it),")
    print(f"  with what clients had that left {sum(given.values()) / span:.0f}")
    for key, outcomes in sorted(tally.outcomes.items()):
        kinds = {kind: sum(o.kind == kind for o in outcomes) for kind in sorted({o.kind for o in outcomes})}
        waits = [o.first - o.came for o in outcomes if o.kind == "done" and o.first is not None]
        print(f"{key}: {kinds}, first token after {statistics.median(waits):.1f} s in the median")
    ratio = given["light"] / given["heavy"]
    print(f"tokens given, light : heavy = {given['light']} : {given['heavy']} ({ratio:.2f}); whole {done}")
    met = [(r.retry_after, again.first - again.came) for r, again in tally.retries if again.first is not None]
    if met:
        ratios = sorted(told / max(wait, SHORTEST_WAIT_S) for told, wait in met)
        within = sum(0.5 <= each <= 2 for each in ratios) / len(ratios)
        tenths = [round(each, 2) for each in statistics.quantiles(ratios, n=10)]
        print(
            f"Retry-After / wait met, of {len(met)} of {len(tally.retries)} retries: within a factor of 2 {within:.2f}"
        )
        told, waited = (statistics.median(column) for column in zip(*met, strict=True))
        print(f"  tenths {tenths}; told {told} s, met {waited:.1f} s in the median")
    print("router, private MB: " + ", ".join(f"{at:.0f} s {size / 1e6:.1f}" for at, size in tally.memory[::4]))


async def measure(served: Served, arguments: argparse.Namespace) -> None:
    client = Client(served.http, time.monotonic())
    await client.ask("heavy", None)
    able = await capacity(client)
    for times, seconds, leave in (
        (arguments.times, arguments.seconds, arguments.leave),
        (arguments.times * 1.5, arguments.seconds / 2, 0.0),
    ):
        rate = times * able / MAX_TOKENS
        print(f"{rate:.1f} requests a second, {leave:.0%} of the clients leave within {arguments.patience:g} s")
        tally = await overload(client, served, rate, seconds, leave, arguments.patience)
        before, able = able, await capacity(client)  # other work on the machine changes it
        print(f"capacity before and after: {before:.0f} and {able:.0f} tokens/s")
        report(tally, (before + able) / 2, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--times", type=float, default=3, help="of the capacity")
    parser.add_argument("--leave", type=float, default=0.5, help="the part of the clients that leaves early")
    parser.add_argument("--patience", type=float, default=10, help="seconds within which they do")
    arguments = parser.parse_args()
    http_port, grpc_port = free_ports(2)
    with sandbox() as home:
        keys = home.home / "keys.yaml"
        keys.write_text("".join(f"- {{name: {key}, sha256: {hash_of('nbl-' + key)}}}\n" for key in SHARES))
        config = (
            f"auth: {{api_keys_file: {keys}}}\n"
            "models:\n"
            "- {name: llama, family: llama, checkpoint: 'builtin:llama', threads: 1, queue: {max_queued: 16}}\n"
        )
        with serving(home, config, http_port, grpc_port) as served:
            asyncio.run(measure(served, arguments))


if __name__ == "__main__":
    main()
