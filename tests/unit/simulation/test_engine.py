"""The simulated engine: it gives as many tokens a second as were measured, and loses and invents no work."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

import pytest

from tests.bench.simulation import virtual_time
from tests.bench.simulation.engine import MEASURED_CONTEXT, ZEN5, Engine, Sequence, StepTimes

EVEN = StepTimes(((1, 0.1), (64, 0.1)), step_tokens=64, max_running=32, cache_tokens=1000)


def run(main: Callable[[Engine], Awaitable[None]], times: StepTimes = EVEN) -> Engine:
    async def with_engine() -> Engine:
        engine = Engine(times)
        await main(engine)
        engine.check_integrity()
        return engine

    return virtual_time.run(with_engine)


def now() -> float:
    return asyncio.get_running_loop().time()


# docs/performance.md: 64 tokens in and 32 out, no prompt twice, engine openvino in-process on Zen 5, 2 cores.
@pytest.mark.parametrize(("clients", "measured"), [(1, 30), (4, 82), (8, 98), (16, 117)])
def test_closed_loops_have_the_measured_tokens_a_second(clients: int, measured: float) -> None:
    rates = []

    async def main(engine: Engine) -> None:
        async def client() -> None:
            for _ in range(4):
                sequence = Sequence(64, 32, 0, 0)
                engine.submit(sequence)
                await sequence.done

        await asyncio.gather(*(client() for _ in range(clients)))
        rates.append(clients * 4 * 32 / now())

    run(main, ZEN5)
    assert rates[0] == pytest.approx(measured, rel=0.12)


def test_one_sequence_takes_its_prefill_and_a_step_for_each_further_token() -> None:
    async def main(engine: Engine) -> None:
        sequence = Sequence(640, 11, 0, 0)
        engine.submit(sequence)
        await sequence.first
        assert now() == pytest.approx(10 * 0.1)
        await sequence.done
        assert now() == pytest.approx(10 * 0.1 + 10 * 0.1)

    engine = run(main)
    assert (engine.prefilled, engine.generated) == (pytest.approx(640), pytest.approx(11))


def test_attention_takes_longer_steps_of_longer_contexts() -> None:
    times = EVEN._replace(decode_context_s=1e-4, prefill_context_s=1e-3)

    async def main(engine: Engine) -> None:
        sequence = Sequence(640, 11, 0, 0)
        engine.submit(sequence)
        await sequence.first
        assert now() == pytest.approx(10 * (0.1 + 320 * 1e-3))
        begun = now()
        await sequence.done
        assert now() - begun == pytest.approx(10 * (0.1 + (640 + 5.5 - MEASURED_CONTEXT) * 1e-4))

    run(main, times)


def test_prompts_are_computed_in_the_order_in_which_they_came_beside_what_decodes() -> None:
    async def main(engine: Engine) -> None:
        first, second, third = (Sequence(64, 100, 0, 0) for _ in range(3))
        for sequence in (first, second, third):
            engine.submit(sequence)
        await first.first
        assert now() == pytest.approx(0.1)
        await second.first
        assert now() == pytest.approx(0.1 + 0.1 * 64 / 63)  # of a step one token is the first sequence's
        assert not third.first.done()
        await third.first
        assert now() == pytest.approx(0.1 + 0.1 * 64 / 63 + 0.1 * 64 / 62)

    run(main)


def test_no_more_run_at_once_than_the_engine_computes_together() -> None:
    async def main(engine: Engine) -> None:
        sequences = [Sequence(1, 10, 0, 0) for _ in range(3)]
        for sequence in sequences:
            engine.submit(sequence)
        await sequences[1].done
        assert not sequences[2].first.done()
        await sequences[2].done

    run(main, EVEN._replace(max_running=1))


def test_a_random_load_conserves_work_whoever_leaves() -> None:
    random = Random(7)
    served: list[Sequence] = []
    left: list[Sequence] = []

    async def main(engine: Engine) -> None:
        async def client() -> None:
            await asyncio.sleep(random.uniform(0, 200))
            sequence = Sequence(random.randint(1, 300), random.randint(1, 200), random.randint(0, 20), 0)
            engine.submit(sequence)
            engine.check_integrity()
            if random.random() < 0.3:
                await asyncio.sleep(random.uniform(0, 20))
                (served if sequence.done.done() else left).append(sequence)
                engine.leave(sequence)
                engine.leave(sequence)
            else:
                await sequence.done
                served.append(sequence)
            engine.check_integrity()

        await asyncio.gather(*(client() for _ in range(300)))
        assert engine.ongoing == 0

    engine = run(main, ZEN5)
    assert served
    assert left
    assert all(sequence.generated == sequence.completion_tokens for sequence in served)
    # Of those that left the counts are rounded, each by half a token at most.
    assert engine.generated == pytest.approx(sum(each.generated for each in served + left), abs=len(left))
    computed = sum(each.prompt_tokens for each in served + left if each.first.done())
    assert computed <= engine.prefilled + 0.01 <= computed + sum(each.prompt_tokens for each in left) + 0.02
    # Every token but a sequence's first one comes after another one.
    begun = sum(each.first.done() for each in served + left)
    assert sum(engine.gaps.values()) == pytest.approx(engine.generated - begun, abs=0.01)


def test_a_conversation_s_next_turn_computes_only_what_is_new() -> None:
    async def main(engine: Engine) -> None:
        for prompt, shared in ((100, 0), (200, 110)):
            sequence = Sequence(prompt, 10, 1, shared)
            engine.submit(sequence)
            await sequence.done
        assert sequence.cached == 96  # whole blocks
        other = Sequence(200, 10, 2, 110)
        engine.submit(other)
        await other.done
        assert other.cached == 0

    assert run(main).prefilled == pytest.approx(100 + 104 + 200)


def test_the_cache_drops_what_was_used_longest_ago() -> None:
    async def main(engine: Engine) -> None:
        async def turn(conversation: int, shared: int) -> int:
            sequence = Sequence(390, 10, conversation, shared)
            engine.submit(sequence)
            await sequence.done
            return sequence.cached

        await turn(1, 0)
        await turn(2, 0)
        assert await turn(1, 400) > 0
        await turn(3, 0)  # of 1000 tokens 1200 would be used
        assert await turn(1, 400) > 0
        assert await turn(2, 400) == 0

    run(main)
