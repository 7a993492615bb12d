"""The bigdl engine on the demo artifacts, with the real libraries. What may kill the process runs in a child."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from cluster.artifacts.manifest import Manifest
from cluster.errors import ArtifactError, EngineError, InvalidRequestError
from cluster.families import FAMILY_NAMES, FamilyName
from cluster.machine.isa import available_cores, choose_isa
from deployments.engines.base import Token, TokenRequest
from deployments.engines.bigdl.engine import BigdlEngine
from deployments.records import SamplingParams
from tests.integration.engines.slow_mask import SlowMask

Artifact = Callable[[FamilyName], Path]
CONTEXT = 160
GREEDY = SamplingParams(temperature=0)


def ids(seed: int, count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, 512, count)]


async def collect(engine: BigdlEngine, request: TokenRequest) -> list[Token]:
    return [token async for batch in engine.generate(request) for token in batch]


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def engine(request: pytest.FixtureRequest, demo_artifact: Artifact) -> Iterator[BigdlEngine]:
    engine = BigdlEngine(demo_artifact(request.param), threads=1, context=CONTEXT)
    yield engine
    engine.check_integrity()
    engine.close()


async def test_a_seeded_request_gives_the_same_tokens_whatever_came_before(engine: BigdlEngine) -> None:
    request = TokenRequest(ids(6, 70), 12, SamplingParams(seed=11, top_p=0.95))
    first = await collect(engine, request)
    await collect(engine, TokenRequest(ids(6, 50), 5, SamplingParams(seed=2)))
    assert await collect(engine, request) == first
    assert await collect(engine, request) == first
    assert [token.finish_reason for token in first] == [None] * 11 + ["length"]


async def test_the_first_token_tells_how_much_of_the_prompt_was_in_the_cache(engine: BigdlEngine) -> None:
    for logprobs in (None, 1):
        await collect(engine, TokenRequest(ids(16, 70), 2, GREEDY))
        request = TokenRequest(ids(17, 70), 3, GREEDY, logprobs=logprobs)
        assert [token.reused for token in await collect(engine, request)] == [0, 0, 0]
        before = int(engine.info()["reused_tokens"])
        first, *others = await collect(engine, request)
        assert 0 < first.reused < 70
        assert int(engine.info()["reused_tokens"]) - before == first.reused
        assert [token.reused for token in others] == [0, 0]


@pytest.mark.parametrize("split", [1, 5, 40])
async def test_an_engine_goes_on_bit_for_bit_behind_tokens_that_another_drew(engine: BigdlEngine, split: int) -> None:
    sampling = SamplingParams(seed=3, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.3)
    request = TokenRequest(ids(14, 35), 45, sampling, logprobs=2)
    whole = await collect(engine, request)
    await collect(engine, TokenRequest(ids(15, 50), 3, GREEDY))  # so that nothing of it is left in the cache
    rest = await collect(engine, replace(request, generated=[token.id for token in whole[:split]]))
    assert rest == whole[split:]
    with pytest.raises(InvalidRequestError, match="45 tokens were generated before"):
        await collect(engine, replace(request, generated=[token.id for token in whole]))


async def test_generation_ends_at_an_end_token_and_where_the_context_is_full(engine: BigdlEngine) -> None:
    prompt = ids(7, CONTEXT - 5)
    tokens = await collect(engine, TokenRequest(prompt, 100, GREEDY))
    assert len(tokens) == 5
    assert tokens[-1].finish_reason == "length"
    ends = await collect(engine, TokenRequest(prompt, 100, GREEDY, frozenset({tokens[2].id})))
    index = [token.id for token in tokens].index(tokens[2].id)
    assert [token.id for token in ends] == [token.id for token in tokens[: index + 1]]
    assert ends[-1].finish_reason == "stop"


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "field"),
    [([], 1, "prompt"), ([1] * CONTEXT, 1, "prompt"), ([1], 0, "max_tokens"), ([600], 1, "prompt")],
)
async def test_requests_that_cannot_be_served_are_refused(
    engine: BigdlEngine, prompt: list[int], max_tokens: int, field: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await collect(engine, TokenRequest(prompt, max_tokens))
    assert caught.value.field == field


async def test_closing_a_stream_stops_the_engine_before_its_next_token(engine: BigdlEngine) -> None:
    before = engine.info()
    stream = engine.generate(TokenRequest(ids(8, 20), 130, GREEDY, mask=SlowMask()))
    first = await anext(stream)
    await stream.aclose()
    engine.check_integrity()  # waits until the worker is free
    after = engine.info()
    assert int(after["cancelled"]) == int(before["cancelled"]) + 1
    # What was handed over, what was ready when the stream was closed, and at most the token in the making.
    assert int(after["generated_tokens"]) - int(before["generated_tokens"]) <= len(first) + 20
    assert len(await collect(engine, TokenRequest(ids(8, 20), 3, GREEDY))) == 3


async def test_a_request_cancelled_while_it_waits_never_reaches_the_library(engine: BigdlEngine) -> None:
    requests = engine.info()["requests"]
    running = asyncio.create_task(collect(engine, TokenRequest(ids(9, 30), 120, GREEDY, mask=SlowMask())))
    while engine.info()["requests"] == requests:
        await asyncio.sleep(0)
    waiting = asyncio.create_task(collect(engine, TokenRequest(ids(10, 30), 5, GREEDY)))
    last = asyncio.create_task(collect(engine, TokenRequest(ids(11, 30), 5, GREEDY)))
    await asyncio.sleep(0)
    waiting.cancel()
    before = engine.info()
    assert len(await running) == 120
    assert len(await last) == 5
    with pytest.raises(asyncio.CancelledError):
        await waiting
    engine.check_integrity()
    assert int(engine.info()["requests"]) <= int(before["requests"]) + 2
    assert engine.info()["cancelled"] == before["cancelled"]


async def test_a_slow_consumer_gets_several_tokens_at_once_and_the_loop_stays_free(engine: BigdlEngine) -> None:
    batches, ticks = [], 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.001)

    ticker = asyncio.create_task(tick())
    async for batch in engine.generate(TokenRequest(ids(12, 10), 100, GREEDY)):
        batches.append(len(batch))
        await asyncio.sleep(0.02)
    ticker.cancel()
    assert sum(batches) == 100
    assert max(batches) > 1
    assert ticks > 2 * len(batches)


async def test_requests_take_turns_in_the_order_in_which_they_came(engine: BigdlEngine) -> None:
    done: list[int] = []

    async def one(number: int) -> list[Token]:
        tokens = await collect(engine, TokenRequest(ids(20 + number, 20), 6, SamplingParams(seed=number)))
        done.append(number)
        return tokens

    began, came = time.monotonic(), []
    asked = asyncio.gather(*(one(number) for number in range(5)))
    asyncio.get_running_loop().call_soon(lambda: came.append(time.monotonic()))  # when all have come
    together = await asked
    assert done == [0, 1, 2, 3, 4]
    # Who comes later waits for the prompts of all before, too, but for the time that it came later.
    for before, tokens in pairwise(together):
        assert tokens[0].queued_s + (came[0] - began) >= before[0].queued_s + before[0].prefill_s > 0
    assert {(token.queued_s, token.prefill_s) for tokens in together for token in tokens[1:]} == {(0, 0)}
    assert [await one(number) for number in range(5)] == together


async def test_churn_leaves_the_engine_sound(engine: BigdlEngine) -> None:
    rng = np.random.default_rng(13)

    async def one(number: int) -> None:
        request = TokenRequest(ids(int(rng.integers(3)), int(rng.integers(1, 100))), 20, SamplingParams(seed=number))
        await asyncio.wait_for(collect(engine, request), float(rng.uniform(0.001, 0.2)))

    await asyncio.gather(*(one(number) for number in range(30)), return_exceptions=True)
    engine.check_integrity()
    expected = await collect(engine, TokenRequest(ids(1, 80), 5, GREEDY))
    assert await collect(engine, TokenRequest(ids(1, 80), 5, GREEDY)) == expected


def test_the_library_tokenizer_takes_text_there_and_back(engine: BigdlEngine) -> None:
    text = b"Q: What is CPU? A:"
    tokens = engine.tokenize(text)
    assert tokens
    assert engine.detokenize(tokens).strip().endswith(text)
    assert engine.tokenize(b"") == []
    with pytest.raises(InvalidRequestError):
        engine.tokenize(b"a\0b")
    with pytest.raises(InvalidRequestError):
        engine.detokenize([512])


def test_info_names_what_status_shows(engine: BigdlEngine) -> None:
    info = engine.info()
    assert info["engine"] == "bigdl"
    assert info["isa"] == choose_isa()
    assert info["threads"] == 1
    assert {"cores", "context", "requests", "prompt_tokens", "reused_tokens", "generated_tokens"} <= info.keys()


async def test_a_closed_engine_ends_its_streams_and_takes_no_more(demo_artifact: Artifact) -> None:
    engine = BigdlEngine(demo_artifact("llama"), 1, CONTEXT)
    running = asyncio.create_task(collect(engine, TokenRequest(ids(1, 20), 130, GREEDY, mask=SlowMask())))
    waiting = asyncio.create_task(collect(engine, TokenRequest(ids(2, 20), 130, GREEDY)))
    while engine.info()["requests"] == 0:
        await asyncio.sleep(0)
    await asyncio.to_thread(engine.close)
    for task in (running, waiting):
        with pytest.raises(EngineError, match="closed"):
            await asyncio.wait_for(task, 5)
    with pytest.raises(EngineError, match="closed"):
        await collect(engine, TokenRequest([1], 1))
    engine.close()


def test_more_threads_than_cores_and_foreign_cores_are_refused(demo_artifact: Artifact) -> None:
    limit = available_cores()
    with pytest.raises(EngineError, match=f"1 to {limit}"):
        BigdlEngine(demo_artifact("bloom"), limit + 1, CONTEXT)
    with pytest.raises(EngineError, match="threads"):
        BigdlEngine(demo_artifact("bloom"), 0, CONTEXT)
    with pytest.raises(EngineError, match="cores"):
        BigdlEngine(demo_artifact("bloom"), 1, CONTEXT, cores=[100_000])
    with pytest.raises(EngineError, match="1 to 512"):
        BigdlEngine(demo_artifact("starcoder"), 1, 513)


def test_a_binary_that_does_not_fit_the_manifest_is_refused(demo_artifact: Artifact, tmp_path: Path) -> None:
    folder = shutil.copytree(demo_artifact("gptneox"), tmp_path / "a")
    binary = folder / Manifest.read(folder).binary
    binary.write_bytes(binary.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="bytes"):
        BigdlEngine(folder, 1, CONTEXT)


def test_loading_says_nothing_and_maps_the_file(demo_artifact: Artifact) -> None:
    code = f"""
from pathlib import Path
from deployments.engines.bigdl.engine import BigdlEngine
import sys
engine = BigdlEngine(Path({str(demo_artifact("llama"))!r}), 1, 64)
maps = Path("/proc/self/maps").read_text()
engine.close()
assert ".bin" in maps and "torch" not in sys.modules and "bigdl.llm" not in sys.modules
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")


def test_the_librarys_threads_run_on_the_engines_cores(demo_artifact: Artifact) -> None:
    code = f"""
import asyncio, os
from pathlib import Path
from deployments.engines.base import TokenRequest
from deployments.engines.bigdl.engine import BigdlEngine
core = max(os.sched_getaffinity(0))
before = set(os.listdir("/proc/self/task"))
engine = BigdlEngine(Path({str(demo_artifact("bloom"))!r}), 1, 64, cores=[core])
async def run():
    async for _ in engine.generate(TokenRequest([5, 6], 3)): pass
asyncio.run(run())
new = set(os.listdir("/proc/self/task")) - before
assert new and all(os.sched_getaffinity(int(task)) == {{core}} for task in new), new
assert len(os.sched_getaffinity(0)) >= 1
engine.close()
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
