from __future__ import annotations

from deployments.engines.bigdl.timings import Timings, TimingsClock


def test_the_lines_are_those_of_the_reference() -> None:
    timings = Timings(2.5, TimingsClock(0.01303, 32), TimingsClock(0.14113, 9), TimingsClock(3.64695, 31), 3.90021)
    assert timings.lines() == [
        "bigdl-llm timings:        load time =  2500.00 ms",
        "bigdl-llm timings:      sample time =    13.03 ms /    32 runs   (    0.41 ms per token)",
        "bigdl-llm timings: prompt eval time =   141.13 ms /     9 tokens (   15.68 ms per token)",
        "bigdl-llm timings:        eval time =  3646.95 ms /    31 runs   (  117.64 ms per token)",
        "bigdl-llm timings:       total time =  3900.21 ms",
    ]


def test_no_token_is_no_division_by_zero() -> None:
    assert Timings().lines()[3].endswith("0.00 ms /     0 runs   (    0.00 ms per token)")


def test_a_clock_adds_up() -> None:
    clock = TimingsClock()
    for tokens in (1, 4):
        with clock.measure(tokens):
            pass
    assert clock.tokens == 5
    assert clock.seconds > 0
