"""Warm-up, loops, rounds: what sends the requests and notes what came back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from itertools import count

from cluster.bench.figures import figures_of
from cluster.bench.load_records import (
    Client,
    Ending,
    Failure,
    Fields,
    Load,
    LoadClock,
    LoadSettings,
    Prompt,
    Reply,
    Run,
    Sent,
)
from cluster.bench.prompts import TOKEN_PROMPTS
from cluster.bench.schedule import arrivals, request_count, turns
from cluster.errors import NibbleError

IGNORE_EOS: Fields = {"ignore_eos": True}
WITH_USAGE: Fields = {"stream_options": {"include_usage": True}}
# What a server answers where it does not take a request's fields.
REFUSED = ("HTTP 400", "HTTP 422")
# A worker whose request failed waits so long: a server that refuses is not asked thousands of times a second.
PAUSE_S = 0.1
UNFINISHED = Failure("unfinished", "when the run was ended")

Send = Callable[[float], Awaitable[bool]]  # whether it succeeded
Say = Callable[[str], None]


class SystemClock:
    def now(self) -> float:
        return time.perf_counter()

    async def sleep_until(self, time: float) -> None:
        await asyncio.sleep(max(0.0, time - self.now()))


@dataclass
class Bench:
    """One benchmark. `client_of` makes the client for a server by its place in the settings. `runs` holds what was
    measured so far, also after an interruption."""

    settings: LoadSettings
    client_of: Callable[[int], Client]
    prompts: Iterator[Prompt]
    say: Say
    clock: LoadClock = field(default_factory=SystemClock)
    runs: list[Run] = field(default_factory=list)

    async def measure(self) -> None:
        """All servers under all loads. Raises NibbleError where a server does not answer the first requests."""
        # Made here: gRPC's belong to the event loop that runs when they are made.
        clients = [self.client_of(place) for place in range(len(self.settings.servers))]
        try:
            fields = [await self._warm_up(place, client) for place, client in enumerate(clients)]
            for load, round, server in turns(self.settings):
                await self._run(load, round, server, clients[server], fields[server])
        finally:
            for client in clients:
                await client.close()

    async def _warm_up(self, place: int, client: Client) -> Fields:
        """The first requests, which do not count; gives the fields that the server takes."""
        server, limit_s = self.settings.servers[place], self.settings.time_limit_s
        try:
            fields, reply = await asyncio.wait_for(self._first_replies(server.url, client), limit_s)
        except asyncio.TimeoutError:
            raise NibbleError(f"{server.url}: no answer within {limit_s:g} s") from None
        if reply.failure is not None:
            raise NibbleError(f"{server.url}: {reply.failure}{hint(reply.failure, self.settings.prompts)}")
        if "ignore_eos" not in fields:
            self.say(f"{server.label} takes no ignore_eos: completions may have fewer than the tokens asked for.")
        return fields

    async def _first_replies(self, url: str, client: Client) -> tuple[Fields, Reply]:
        """With fewer fields each time while the server refuses them; then the rest of the warm-up. The last reply."""
        for fields in optional_fields(url):
            reply = await client.complete(next(self.prompts), fields)
            if reply.failure is None or reply.failure.kind not in REFUSED:
                break
        for _ in range(self.settings.warmup - 1):
            if reply.failure is not None:
                break
            reply = await client.complete(next(self.prompts), fields)
        return fields, reply

    async def _run(self, load: Load, round: int, server: int, client: Client, fields: Fields) -> None:
        settings, clock = self.settings, self.clock
        requests: list[Sent] = []
        started, start, cpu = datetime.now(timezone.utc), clock.now(), time.process_time()

        def note(due: float, sent: float, reply: Reply) -> None:
            requests.append(Sent(due, sent, since(start, reply)))

        async def send(due: float) -> bool:
            prompt, sent = next(self.prompts), clock.now() - start
            try:
                reply = await client.complete(prompt, fields)
            except asyncio.CancelledError:
                note(due, sent, Reply((), clock.now(), failure=UNFINISHED))
                raise
            note(due, sent, reply)
            return reply.failure is None

        number = request_count(load, settings.requests, settings.duration_s)
        if load.kind == "concurrency":
            work = closed_loop(send, int(load.value), number, settings.duration_s, start, clock)
        else:
            seed = f"{settings.seed} {load} {round}"
            work = open_loop(send, arrivals(load.value, number, settings.duration_s, seed), start, clock)
        ending: Ending = "interrupted"
        try:
            ending = await bounded(work, settings.time_limit_s)
        finally:
            seconds = max((sent.reply.end for sent in requests), default=0.0)
            used = time.process_time() - cpu
            run = Run(server, load, round, started.isoformat(), seconds, used, tuple(requests), ending)
            self.runs.append(run)
            self.say(run_line(run, settings))


async def closed_loop(
    send: Send, workers: int, number: int | None, duration_s: float | None, start: float, clock: LoadClock
) -> None:
    """`number` and `duration_s` bound what is begun; what was begun is waited for."""
    left = iter(count() if number is None else range(number))

    async def worker() -> None:
        for _ in left:
            due = clock.now() - start
            if duration_s is not None and due >= duration_s:
                return
            if not await send(due):
                await clock.sleep_until(clock.now() + PAUSE_S)

    await asyncio.gather(*(worker() for _ in range(workers)))


async def open_loop(send: Send, dues: Sequence[float], start: float, clock: LoadClock) -> None:
    """Sends at each of the times, seconds from the start, whatever is outstanding."""
    tasks: list[asyncio.Future[bool]] = []
    try:
        for due in dues:
            await clock.sleep_until(start + due)
            tasks.append(asyncio.ensure_future(send(due)))
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def bounded(work: Coroutine[None, None, None], limit_s: float) -> Ending:
    """Ends the work, and what it has begun, at the limit or when this is cancelled."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=limit_s)
        if not task.done():
            return "time limit"
        task.result()
        return "whole"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def optional_fields(url: str) -> tuple[Fields, ...]:
    """What to ask with, the fullest first."""
    if url.startswith("grpc"):
        return (IGNORE_EOS,)
    return {**IGNORE_EOS, **WITH_USAGE}, WITH_USAGE, {}


def since(start: float, reply: Reply) -> Reply:
    return replace(reply, chunks=tuple(time - start for time in reply.chunks), end=reply.end - start)


def hint(failure: Failure, prompts: str) -> str:
    if failure.kind == "connection" or failure.kind == "gRPC UNAVAILABLE":
        return "; is a server running there?"
    if failure.kind in (*REFUSED, "gRPC INVALID_ARGUMENT") and prompts == TOKEN_PROMPTS:
        return "; prompts are token ids: --vocabulary bounds them, --text-prompts sends words instead"
    return ""


def run_line(run: Run, settings: LoadSettings) -> str:
    label, figures, failed = settings.servers[run.server].label, figures_of(run), len(run.requests) - len(run.succeeded)
    line = f"{run.load}, round {run.round + 1} of {settings.rounds}, {label}: "
    if "ttft_p50_s" in figures:
        line += f"{figures['output_tokens_per_s']:.1f} tokens/s, first token {figures['ttft_p50_s'] * 1e3:.1f} ms, "
    line += f"{len(run.succeeded)} of {len(run.requests)} requests in {run.seconds:.1f} s"
    if failed:
        line += f", {failed} failed"
    return line if run.ending == "whole" else f"{line}; ended early: {run.ending}"
