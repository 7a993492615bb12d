"""Loops, warm-up and rounds, on clients that answer at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from cluster.bench.load_records import Client, Failure, Fields, Load, LoadSettings, Prompt, Reply
from cluster.bench.prompts import token_prompts
from cluster.bench.runner import PAUSE_S, Bench, bounded
from cluster.bench.schedule import arrivals
from cluster.errors import ConfigError, NibbleError
from tests.unit.bench_records import FULL, settings_for

HTTP_FIELDS = {"ignore_eos": True, "stream_options": {"include_usage": True}}


class FakeClock:
    """Its time passes while someone sleeps, and a microsecond with each request."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    async def sleep_until(self, time: float) -> None:
        await asyncio.sleep(0)  # what was begun before gets its turn at the time at which it was begun
        self.time = max(self.time, time)


class FakeClient:
    """Answers with three chunks after a few turns of the event loop; `fail` gives a request's failure by its fields and
    the number of requests before it."""

    def __init__(
        self, clock: FakeClock, fail: Callable[[Fields, int], Failure | None] = lambda fields, n: None
    ) -> None:
        self.clock = clock
        self.fail = fail
        self.prompts: list[Prompt] = []
        self.fields: list[Fields] = []
        self.times: list[float] = []
        self.outstanding = self.most_outstanding = 0
        self.hangs = False
        self.closed = False

    async def complete(self, prompt: Prompt, fields: Fields) -> Reply:
        failure = self.fail(fields, len(self.prompts))
        self.prompts.append(prompt)
        self.fields.append(fields)
        self.times.append(self.clock.now())
        self.outstanding += 1
        self.most_outstanding = max(self.most_outstanding, self.outstanding)
        try:
            for _ in range(5):
                await asyncio.sleep(0)
            self.clock.time += 1e-6
            if self.hangs:
                await asyncio.Event().wait()
        finally:
            self.outstanding -= 1
        now = self.clock.now()
        return Reply((), now, failure=failure) if failure else Reply((now, now, now), now, 4, 3)

    async def close(self) -> None:
        self.closed = True


def bench_of(settings: LoadSettings, *clients: Client, clock: FakeClock | None = None) -> tuple[Bench, list[str]]:
    said: list[str] = []
    prompts = token_prompts(settings.seed, settings.input_tokens, 500)
    return Bench(settings, lambda place: clients[place], prompts, said.append, clock or FakeClock()), said


async def test_a_closed_loop_keeps_so_many_outstanding_and_sends_so_many() -> None:
    clock = FakeClock()
    client = FakeClient(clock)
    bench, said = bench_of(settings_for("http://a", loads=(Load("concurrency", 4),), requests=10), client, clock=clock)
    await bench.measure()
    assert [len(run.requests) for run in bench.runs] == [10, 10]
    assert [run.round for run in bench.runs] == [0, 1]
    assert {run.ending for run in bench.runs} == {"whole"}
    assert client.most_outstanding == 4
    assert len(client.prompts) == len(set(client.prompts)) == 2 + 20
    assert client.closed
    assert said[0].startswith("concurrency 4, round 1 of 2, A: ")
    assert "10 of 10 requests" in said[0]


async def test_an_open_loop_sends_at_the_scheduled_times_whatever_is_outstanding() -> None:
    clock = FakeClock()
    client = FakeClient(clock)
    settings = settings_for("http://a", loads=(Load("rate", 50),), requests=20, rounds=1, warmup=1)
    bench, _ = bench_of(settings, client, clock=clock)
    await bench.measure()
    dues = arrivals(50, 20, None, "7 50 requests/s 0")
    assert client.times[1:] == [pytest.approx(100.0 + due) for due in dues]
    (run,) = bench.runs
    assert sorted(sent.due for sent in run.requests) == dues
    assert client.most_outstanding > 1


async def test_waiting_counts_from_the_scheduled_time() -> None:
    class LateClock(FakeClock):
        async def sleep_until(self, time: float) -> None:
            await super().sleep_until(time + 3.0)

    clock = LateClock()
    bench, _ = bench_of(settings_for("http://a", loads=(Load("rate", 50),), requests=5), FakeClient(clock), clock=clock)
    await bench.measure()
    for sent in bench.runs[0].requests:
        assert sent.sent - sent.due > 2.9
        assert sent.latency_s >= sent.first_token_s >= sent.sent - sent.due


async def test_servers_take_turns_with_prompts_of_their_own() -> None:
    clock = FakeClock()
    first, second = FakeClient(clock), FakeClient(clock)
    bench, _ = bench_of(settings_for("http://a", "grpc://b:1", rounds=3), first, second, clock=clock)
    await bench.measure()
    assert [run.server for run in bench.runs] == [0, 1, 1, 0, 0, 1]
    assert not set(first.prompts) & set(second.prompts)
    assert first.fields[-1] == HTTP_FIELDS
    assert second.fields[-1] == {"ignore_eos": True}


@pytest.mark.parametrize(
    ("taken", "expected", "words"),
    [
        ({"ignore_eos", "stream_options"}, HTTP_FIELDS, ""),
        ({"stream_options"}, {"stream_options": {"include_usage": True}}, "A takes no ignore_eos"),
        (set(), {}, "A takes no ignore_eos"),
    ],
)
@pytest.mark.parametrize("status", ["HTTP 400", "HTTP 422"])
async def test_fields_that_a_server_refuses_are_left_out(
    taken: set[str], expected: Fields, words: str, status: str
) -> None:
    clock = FakeClock()
    client = FakeClient(clock, lambda fields, n: None if set(fields) <= taken else Failure(status, "unknown field"))
    bench, said = bench_of(settings_for("http://a"), client, clock=clock)
    await bench.measure()
    assert client.fields[-1] == expected
    assert all(sent.reply.failure is None for run in bench.runs for sent in run.requests)
    assert [line for line in said if "ignore_eos" in line] == (
        [line for line in said if words in line] if words else []
    )


@pytest.mark.parametrize(
    ("failure", "requests", "words"),
    [
        (Failure("HTTP 404", "no such model"), 1, "http://a: HTTP 404: no such model$"),
        (Failure("HTTP 400", "prompt"), 3, "http://a: HTTP 400: prompt; prompts are token ids: --vocabulary"),
        (Failure("connection", "refused"), 1, r"http://a: connection: refused; is a server running there\?"),
    ],
)
async def test_a_server_that_does_not_answer_ends_it_at_once(failure: Failure, requests: int, words: str) -> None:
    client = FakeClient(FakeClock(), lambda fields, n: failure)
    bench, _ = bench_of(settings_for("http://a"), client)
    with pytest.raises(NibbleError, match=words):
        await bench.measure()
    assert (len(client.prompts), bench.runs, client.closed) == (requests, [], True)


async def test_a_warm_up_that_fails_later_ends_it_too() -> None:
    client = FakeClient(FakeClock(), lambda fields, n: FULL if n == 2 else None)
    bench, _ = bench_of(settings_for("http://a", warmup=5), client)
    with pytest.raises(NibbleError, match="HTTP 429: queue full"):
        await bench.measure()


async def test_a_server_that_hangs_at_the_warm_up_ends_it_at_the_limit() -> None:
    client = FakeClient(FakeClock())
    client.hangs = True
    bench, _ = bench_of(settings_for("http://a", time_limit_s=0.05), client)
    with pytest.raises(NibbleError, match=r"http://a: no answer within 0\.05 s"):
        await bench.measure()


async def test_failures_are_noted_and_a_worker_waits_after_one() -> None:
    clock = FakeClock()
    client = FakeClient(clock, lambda fields, n: FULL if n % 2 == 0 else None)
    load = Load("concurrency", 1)
    bench, said = bench_of(settings_for("http://a", loads=(load,), rounds=1, warmup=1), client, clock=clock)
    client.fail = lambda fields, n: FULL if n in (2, 4) else None
    await bench.measure()
    (run,) = bench.runs
    assert [sent.reply.failure for sent in run.requests] == [None, FULL, None, FULL, None, None]
    assert clock.time == pytest.approx(100.0 + 2 * PAUSE_S)
    assert "4 of 6 requests" in said[0]
    assert "2 failed" in said[0]


async def test_a_duration_bounds_what_is_begun() -> None:
    clock = FakeClock()
    client = FakeClient(clock, lambda fields, n: FULL if n else None)
    settings = settings_for(
        "http://a", loads=(Load("concurrency", 1),), requests=None, duration_s=1.0, rounds=1, warmup=1
    )
    bench, _ = bench_of(settings, client, clock=clock)
    await bench.measure()
    # One each PAUSE_S, and none from the first second's end on.
    assert len(bench.runs[0].requests) in (10, 11)
    assert max(client.times) < 101.0


@pytest.mark.parametrize("load", [Load("concurrency", 3), Load("rate", 1000)])
async def test_the_time_limit_ends_a_run_and_what_it_has_begun(load: Load) -> None:
    client = FakeClient(FakeClock(), lambda fields, n: None)
    bench, said = bench_of(settings_for("http://a", loads=(load,), requests=3, time_limit_s=0.2, warmup=1), client)
    hang_after_warm_up(client)
    await bench.measure()
    for run in bench.runs:
        assert run.ending == "time limit"
        assert [sent.reply.failure.kind for sent in run.requests if sent.reply.failure] == ["unfinished"] * 3
    assert client.outstanding == 0
    assert said[0].endswith("ended early: time limit")


async def test_an_interruption_keeps_what_was_measured() -> None:
    client = FakeClient(FakeClock())
    bench, said = bench_of(settings_for("http://a", "http://b", warmup=1), FakeClient(FakeClock()), client)
    hang_after_warm_up(client)
    task = asyncio.ensure_future(bench.measure())
    while client.outstanding == 0 or not bench.runs:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [(run.server, run.ending) for run in bench.runs] == [(0, "whole"), (1, "interrupted")]
    assert len(bench.runs[0].succeeded) == 6
    assert client.outstanding == 0
    assert client.closed
    assert said[-1].endswith("ended early: interrupted")


def hang_after_warm_up(client: FakeClient) -> None:
    def fail(fields: Fields, before: int) -> None:
        client.hangs = before >= 1

    client.fail = fail


async def test_prompts_that_are_used_up_end_it() -> None:
    client = FakeClient(FakeClock())
    bench, _ = bench_of(settings_for("http://a"), client)
    bench.prompts = token_prompts(1, 1, 7)
    with pytest.raises(ConfigError, match="after 4 prompts no more"):
        await bench.measure()


async def test_a_fault_in_the_work_is_not_hidden() -> None:
    async def broken() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await bounded(broken(), 1.0)
