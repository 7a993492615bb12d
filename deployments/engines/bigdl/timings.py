"""How long the parts of a request took, and the lines in which bigdl-llm's libraries print it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class TimingsClock:
    """Seconds of all that was measured, and how many tokens it was."""

    seconds: float = 0.0
    tokens: int = 0

    @contextmanager
    def measure(self, tokens: int = 1) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started
        self.tokens += tokens


@dataclass
class Timings:
    """Of the model's load and of one request. `prompt` counts the tokens that were evaluated, not those reused."""

    load_s: float = 0.0
    sample: TimingsClock = field(default_factory=TimingsClock)
    prompt: TimingsClock = field(default_factory=TimingsClock)
    decode: TimingsClock = field(default_factory=TimingsClock)
    total_s: float = 0.0

    def lines(self) -> list[str]:
        """As the llama and gptneox libraries of bigdl-llm 2.4.0 print them (`llama_print_timings`); those of bloom and
        starcoder have other words for the same."""
        return [
            f"bigdl-llm timings:        load time = {self.load_s * 1e3:8.2f} ms",
            f"bigdl-llm timings:      sample time = {per_token(self.sample, 'runs  ')}",
            f"bigdl-llm timings: prompt eval time = {per_token(self.prompt, 'tokens')}",
            f"bigdl-llm timings:        eval time = {per_token(self.decode, 'runs  ')}",
            f"bigdl-llm timings:       total time = {self.total_s * 1e3:8.2f} ms",
        ]


def per_token(clock: TimingsClock, unit: str) -> str:
    milliseconds = clock.seconds * 1e3
    return (
        f"{milliseconds:8.2f} ms / {clock.tokens:5d} {unit} ({milliseconds / max(1, clock.tokens):8.2f} ms per token)"
    )
