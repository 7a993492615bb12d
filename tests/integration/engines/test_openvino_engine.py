"""The openvino engine behind the Engine contract: many sequences at once, and each as if it were alone."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from cluster.errors import EngineError, InvalidRequestError
from cluster.families import FAMILY_NAMES
from cluster.machine.isa import available_cores, cpu_flags
from cluster.model_config import DraftConfig, OpenvinoConfig
from deployments.engines.base import TokenRequest
from deployments.engines.openvino.batching.batch import Batch
from deployments.engines.openvino.batching.paged_cache import BLOCK_TOKENS
from deployments.engines.openvino.engine import OpenvinoEngine
from deployments.engines.openvino.paged_model import PagedModel
from deployments.engines.products.layout import wants_tiles
from deployments.engines.products.threads import THREAD_NAME
from deployments.records import SamplingParams
from tests.integration.engines.openvino_engines import (
    CONTEXT,
    GREEDY,
    PRECISE,
    TOKENS,
    Artifact,
    Load,
    collect,
    fail,
    ids,
    llama_engines,
    prompt,
)
from tests.integration.engines.slow_mask import SlowMask


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def engine(request: pytest.FixtureRequest, demo_artifact: Artifact) -> Iterator[OpenvinoEngine]:
    engine = OpenvinoEngine(demo_artifact(request.param), 1, CONTEXT, 8, PRECISE)
    yield engine
    engine.check_integrity()
    engine.close()


@pytest.fixture
def llama(demo_artifact: Artifact) -> Iterator[Load]:
    with llama_engines(demo_artifact) as load:
        yield load


async def test_sequences_together_get_the_tokens_that_each_gets_alone(engine: OpenvinoEngine) -> None:
    requests = [
        TokenRequest(prompt(i, 10 + 9 * i), TOKENS, GREEDY if i % 2 else SamplingParams(temperature=0.7, seed=i))
        for i in range(6)
    ]
    alone = [await ids(engine, request) for request in requests]
    before = engine.info()
    together = await asyncio.gather(*(ids(engine, request) for request in requests))
    # One in a hundred draws may fall on the other side of a rounding; whole sequences of others do not come by chance.
    same = [sum(a == b for a, b in zip(one, other, strict=False)) for one, other in zip(alone, together, strict=True)]
    assert sum(count == TOKENS for count in same) >= 5
    assert int(engine.info()["steps"]) - int(before["steps"]) < 3 * TOKENS  # not one after the other: 6 * TOKENS


@pytest.mark.parametrize("split", [1, 20])
async def test_an_engine_goes_on_behind_tokens_that_another_drew(engine: OpenvinoEngine, split: int) -> None:
    request = TokenRequest(prompt(14), 30, SamplingParams(temperature=0, repetition_penalty=1.2))
    whole = await collect(engine, request)
    rest = await collect(engine, replace(request, generated=[token.id for token in whole[:split]]))
    assert [token.id for token in rest] == [token.id for token in whole[split:]]
    assert rest[-1].finish_reason == whole[-1].finish_reason


async def test_generation_ends_at_an_end_token_at_max_tokens_and_where_the_context_is_full(
    engine: OpenvinoEngine,
) -> None:
    tokens = await collect(engine, TokenRequest(prompt(1), TOKENS, GREEDY))
    assert [token.finish_reason for token in tokens] == [None] * (TOKENS - 1) + ["length"]
    end = tokens[4].id
    first = [token.id for token in tokens].index(end)
    ended = await collect(engine, TokenRequest(prompt(1), TOKENS, GREEDY, eos_token_ids=frozenset({end})))
    assert (len(ended), ended[-1].id, ended[-1].finish_reason) == (first + 1, end, "stop")
    full = await collect(engine, TokenRequest(prompt(2, CONTEXT - 3), 50, GREEDY))
    assert (len(full), full[-1].finish_reason) == (3, "length")


async def test_scores_agree_with_what_generating_said_and_embeddings_tell_prompts_apart(engine: OpenvinoEngine) -> None:
    start = prompt(5)
    tokens = await collect(engine, TokenRequest(start, 8, GREEDY, logprobs=2))
    scored = await engine.score([*start, *(token.id for token in tokens)], 2)
    assert scored[0].logprob is None
    for said, score in zip(tokens, scored[len(start) :], strict=True):
        assert said.id == score.id == said.top[0][0]
        assert said.logprob == pytest.approx(score.logprob, abs=0.02)
    one, same, other = await asyncio.gather(engine.embed(start), engine.embed(start), engine.embed(prompt(6)))
    assert np.allclose(one, same, atol=0.02 * float(np.abs(one).max()))
    assert not np.allclose(one, other, atol=0.1)


async def test_a_prompt_that_began_like_an_earlier_one_is_taken_from_the_cache(engine: OpenvinoEngine) -> None:
    start = prompt(7, 3 * BLOCK_TOKENS)
    cold = await collect(engine, TokenRequest(start, 8, GREEDY))
    before = int(engine.info()["reused_tokens"])
    warm = await collect(engine, TokenRequest(start, 8, GREEDY))
    assert int(engine.info()["reused_tokens"]) - before == 2 * BLOCK_TOKENS
    assert [token.id for token in warm] == [token.id for token in cold]
    assert [token.reused for token in cold] == [0] * 8
    assert [token.reused for token in warm] == [2 * BLOCK_TOKENS] + [0] * 7


@pytest.mark.parametrize(
    ("tokens", "max_tokens", "field"),
    [
        ([], 1, "prompt"),
        ([10**6], 1, "prompt"),
        ([-1], 1, "prompt"),
        ([5] * CONTEXT, 1, "prompt"),
        ([5], 0, "max_tokens"),
    ],
)
async def test_what_cannot_be_served_is_refused(
    engine: OpenvinoEngine, tokens: list[int], max_tokens: int, field: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        await ids(engine, TokenRequest(tokens, max_tokens))
    assert refused.value.field == field


async def test_closing_a_stream_stops_it_and_nothing_else(llama: Load) -> None:
    engine = llama()
    stream = engine.generate(TokenRequest(prompt(1), 200, GREEDY, mask=SlowMask()))
    await anext(stream)
    other = asyncio.create_task(ids(engine, TokenRequest(prompt(2), 60, GREEDY)))
    await stream.aclose()
    assert len(await other) == 60
    engine.check_integrity()
    info = engine.info()
    assert (info["cancelled"], info["requests"]) == (1, 2)
    assert int(info["generated_tokens"]) < 60 + 190


async def test_more_sequences_than_may_run_wait_for_their_turn(llama: Load) -> None:
    engine = llama(max_running=2)
    results = await asyncio.gather(*(ids(engine, TokenRequest(prompt(i), 10, GREEDY)) for i in range(7)))
    assert [len(result) for result in results] == [10] * 7


async def test_a_step_that_fails_fails_its_sequences_and_the_engine_goes_on(
    llama: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llama()
    expected = await ids(engine, TokenRequest(prompt(4), 5, GREEDY))

    with monkeypatch.context() as patch:
        patch.setattr(PagedModel, "step", fail)
        with pytest.raises(EngineError, match="OpenVINO failed"):
            await ids(engine, TokenRequest(prompt(4), 5, GREEDY))
    assert await ids(engine, TokenRequest(prompt(4), 5, GREEDY)) == expected


async def test_a_mask_that_fails_fails_its_own_sequence_alone(llama: Load) -> None:
    class Failing:
        def apply(self, logits: object) -> None:
            raise ValueError("no token is allowed")

        def accept(self, token: int) -> None: ...

    engine = llama()
    other = asyncio.create_task(ids(engine, TokenRequest(prompt(1), 20, GREEDY)))
    with pytest.raises(ValueError, match="no token is allowed"):
        await ids(engine, TokenRequest(prompt(2), 20, GREEDY, mask=Failing()))
    assert len(await other) == 20


async def test_nobody_waits_for_an_engine_whose_loop_has_ended(
    demo_artifact: Artifact, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = OpenvinoEngine(demo_artifact("llama"), 1, CONTEXT, 2, PRECISE)
    monkeypatch.setattr(Batch, "add", fail)
    answers = await asyncio.gather(
        *(ids(engine, TokenRequest(prompt(i), 5, GREEDY)) for i in range(3)), return_exceptions=True
    )
    assert [str(answer) for answer in answers] == ["the engine has ended: EngineError: OpenVINO failed"] * 3
    with pytest.raises(EngineError, match="the engine has ended"):
        engine.check_health(None)
    assert "openvino: the engine has ended" in caplog.text
    engine.close()


async def test_closing_the_engine_ends_what_runs_and_what_comes_later(demo_artifact: Artifact) -> None:
    engine = OpenvinoEngine(demo_artifact("llama"), 1, CONTEXT, 2, PRECISE)
    streams = [
        asyncio.create_task(ids(engine, TokenRequest(prompt(i), 200, GREEDY, mask=SlowMask()))) for i in range(4)
    ]
    while engine.info()["generated_tokens"] == 0:
        await asyncio.sleep(0)
    await asyncio.to_thread(engine.close)
    for stream in streams:
        with pytest.raises(EngineError, match="closed"):
            await stream
    with pytest.raises(EngineError, match="closed"):
        await engine.score(prompt(1), 1)
    engine.close()


@pytest.mark.skipif(
    not wants_tiles("throughput", cpu_flags()),
    reason="on this CPU OpenVINO multiplies, and nibble has no threads for it",
)
async def test_nibbles_own_products_give_tokens_and_end_with_the_engine(demo_artifact: Artifact) -> None:
    engine = OpenvinoEngine(demo_artifact("llama"), threads := min(2, available_cores()), CONTEXT, 2, OpenvinoConfig())
    assert engine.info()["products"] == "nibble"
    assert sum(thread.name == THREAD_NAME for thread in threading.enumerate()) == threads - 1
    request = TokenRequest(prompt(1), 20, GREEDY)
    assert await ids(engine, request) == await ids(engine, request)
    await asyncio.to_thread(engine.close)
    gc.collect()
    assert not any(thread.name == THREAD_NAME for thread in threading.enumerate())


def test_what_cannot_be_loaded_is_refused(demo_artifact: Artifact) -> None:
    with pytest.raises(EngineError, match=r"openvino.kv_cache: found 1000 bytes, allowed are \d+ and more"):
        OpenvinoEngine(demo_artifact("llama"), 1, CONTEXT, 2, OpenvinoConfig(tune="precision", kv_cache=1000))
    with pytest.raises(EngineError, match="context: found 513, allowed for this model is 1 to 512"):
        OpenvinoEngine(demo_artifact("starcoder"), 1, 513, 2, PRECISE)
    options = OpenvinoConfig(tune="precision", draft=DraftConfig(checkpoint="builtin:starcoder"))
    with pytest.raises(EngineError, match="context: found 513, allowed for its draft model is 1 to 512"):
        OpenvinoEngine(demo_artifact("llama"), 1, 513, 2, options, draft=demo_artifact("starcoder"))
    with pytest.raises(EngineError, match="threads: found 0"):
        OpenvinoEngine(demo_artifact("llama"), 0, CONTEXT, 2, PRECISE)


def test_its_threads_stay_on_its_cores_and_need_neither_torch_nor_ray(demo_artifact: Artifact) -> None:
    program = f"""
import asyncio, os, sys
from dataclasses import replace
from pathlib import Path
from cluster.model_config import OpenvinoConfig
from deployments.engines.base import TokenRequest
from deployments.engines.openvino.engine import OpenvinoEngine
core = max(os.sched_getaffinity(0))
before = set(os.listdir("/proc/self/task"))
engine = OpenvinoEngine(Path({str(demo_artifact("bloom"))!r}), 1, 64, 2, OpenvinoConfig(), cores=[core])
async def run():
    return [token async for batch in engine.generate(TokenRequest([5, 6], 4)) for token in batch]
assert len(asyncio.run(run())) == 4
started = set(os.listdir("/proc/self/task")) - before
assert started and all(os.sched_getaffinity(int(thread)) == {{core}} for thread in started), started
assert not {{"torch", "ray", "transformers"}} & set(sys.modules)
engine.close()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
