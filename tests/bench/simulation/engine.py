"""A replica's engine, continuous batching, with events only where a prompt or a completion ends.

A step computes one token of every sequence that decodes, and fills what is left of `step_tokens` with the prompts that
wait, first come, first served (`deployments/engines/openvino/batching/scheduler.py`). So between two events every step
is the same: all decode at one rate, and one prompt at another.
"""

from __future__ import annotations

import asyncio
import heapq
from bisect import bisect_left
from collections import OrderedDict, defaultdict, deque
from itertools import count
from typing import NamedTuple

BLOCK = 32  # tokens of the KV cache's blocks
ROUNDING = 1e-6  # of a token


class StepTimes(NamedTuple):
    """Measured: pairs of tokens computed together and seconds; between them a straight line. `max_running`: sequences
    in one step; `cache_tokens`: what the KV cache holds. Attention takes further seconds a step: `decode_context_s`
    for each token before that of a sequence, beyond those that `measured` had, and `prefill_context_s` for each token
    before a piece of a prompt."""

    measured: tuple[tuple[int, float], ...]
    step_tokens: int
    max_running: int
    cache_tokens: int
    decode_context_s: float = 0.0
    prefill_context_s: float = 0.0

    def seconds(self, tokens: float) -> float:
        places = [each for each, _ in self.measured]
        above = min(max(1, bisect_left(places, tokens)), len(places) - 1)
        (x, low), (y, high) = self.measured[above - 1 : above + 1]
        return low + (high - low) * (max(tokens, x) - x) / (y - x)


# 1.4 billion weights, engine openvino, 2 cores of a Zen 5 machine: the first row of tests/bench/NOTES.md. KV cache:
# 3.5 GB of 26 layers with 2 x 2048 values of 8 bits a token. Attention, decode: 13 layers take 8 sequences 29.8 ms
# after 64 tokens and 67.5 ms after 1000 there. Attention, prefill: not measured; 13.6 MFLOP a token before 64 others,
# at 150 GFLOPS, with which a prompt of 1000 tokens has 320 tokens/s.
MEASURED_CONTEXT = 64
ZEN5 = StepTimes(
    ((1, 0.0272), (4, 0.0293), (8, 0.0408), (16, 0.0620), (64, 0.155)),
    step_tokens=64,
    max_running=32,
    cache_tokens=32_000,
    decode_context_s=2 * (0.0675 - 0.0298) / (8 * (1000 - MEASURED_CONTEXT)),
    prefill_context_s=13.6e6 / 150e9,
)


class Sequence:
    """One completion at a replica. `first` and `done` are set at its first and last token."""

    def __init__(self, prompt_tokens: int, completion_tokens: int, conversation: int, shared: int) -> None:
        self.prompt_tokens, self.completion_tokens = prompt_tokens, completion_tokens
        self.conversation, self.shared = conversation, shared
        loop = asyncio.get_running_loop()
        self.first: asyncio.Future[None] = loop.create_future()
        self.done: asyncio.Future[None] = loop.create_future()
        self.cached = 0
        self.left = 0.0  # of the prompt, tokens to compute
        self.started = False  # its prefill
        self.ends_at = 0.0  # in steps of the engine
        # Of a token that it generates, in the mean: so the steps between two events are alike.
        self.context = max(0.0, prompt_tokens + completion_tokens / 2 - MEASURED_CONTEXT)
        self.generated = 0  # tokens, once it is gone
        self.gone = False


class Engine:
    def __init__(self, times: StepTimes) -> None:
        self._times = times
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Sequence] = deque()
        self._decoding: list[tuple[float, int, Sequence]] = []  # a heap, by the step of the last token
        self._number = count()
        self._running = 0  # in `_decoding`, without those that left
        self._context = 0.0  # of all that decode
        self._steps = 0.0
        self._at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._cache: OrderedDict[int, int] = OrderedDict()  # tokens of each conversation, the last used last
        self._cached_tokens = self._held_tokens = 0
        self.gaps: defaultdict[int, float] = defaultdict(float)  # tokens, by the milliseconds since the one before
        self.prefilled = self.generated = 0.0  # tokens computed
        self.busy_s = 0.0

    @property
    def ongoing(self) -> int:
        return len(self._waiting) + self._running

    def submit(self, sequence: Sequence) -> None:
        self._advance()
        self._waiting.append(sequence)
        self._schedule()

    def leave(self, sequence: Sequence) -> None:
        """Wherever it stands; a second time does nothing."""
        if sequence.gone:
            return
        self._advance()
        if not sequence.gone:
            self._end(sequence)
        self._schedule()

    def check_integrity(self) -> None:
        decoding = [each for _, _, each in self._decoding if not each.gone]
        assert self._running == len(decoding)
        assert abs(self._context - sum(each.context for each in decoding)) < 1
        assert self._cached_tokens == sum(self._cache.values())
        assert self._held_tokens >= 0

    def _prefills(self) -> bool:
        return bool(self._waiting) and self._running < self._times.max_running

    def _step(self) -> tuple[float, float]:
        """Seconds of a step as it is now, and the prompt's tokens in it."""
        times, attention = self._times, self._context * self._times.decode_context_s
        if not self._prefills():
            return times.seconds(self._running) + attention, 0.0
        first = self._waiting[0]
        attention += (first.cached + first.prompt_tokens) / 2 * times.prefill_context_s
        return times.seconds(times.step_tokens) + attention, times.step_tokens - self._running

    def _advance(self) -> None:
        """To now, and no further than the next event, which `_schedule` has set the timer for."""
        now = self._loop.time()
        passed, self._at = now - self._at, now
        if passed <= 0 or not (self._running or self._waiting):
            return
        seconds, prompt_tokens = self._step()
        steps = passed / seconds
        self._steps += steps
        self.busy_s += passed
        self.generated += steps * self._running
        if self._running:
            self.gaps[round(seconds * 1000)] += steps * self._running
        if prompt_tokens:
            self._waiting[0].left -= steps * prompt_tokens
            self.prefilled += steps * prompt_tokens

    def _schedule(self) -> None:
        """Ends what is due, and sets the timer for the next event."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while True:
            self._begin_prefill()
            if self._prefills() and self._waiting[0].left <= ROUNDING:
                self._begin_decode(self._waiting.popleft())
            elif self._decoding and (self._decoding[0][2].gone or self._decoding[0][0] <= self._steps + ROUNDING):
                _, _, sequence = heapq.heappop(self._decoding)
                if not sequence.gone:
                    self._finish(sequence)
            else:
                break
        if not (self._running or self._waiting):
            return
        seconds, prompt_tokens = self._step()
        due = []
        if prompt_tokens:
            due.append(self._waiting[0].left / prompt_tokens)
        if self._decoding:
            due.append(self._decoding[0][0] - self._steps)
        self._timer = self._loop.call_later(max(0.0, min(due)) * seconds, self._event)

    def _event(self) -> None:
        self._timer = None
        self._advance()
        self._schedule()

    def _begin_prefill(self) -> None:
        if not self._prefills() or self._waiting[0].started:
            return
        sequence = self._waiting[0]
        sequence.started = True
        there = min(sequence.shared, self._cache.get(sequence.conversation, 0), sequence.prompt_tokens - 1)
        sequence.cached = there // BLOCK * BLOCK
        sequence.left = float(sequence.prompt_tokens - sequence.cached)
        self._cached_tokens -= self._cache.pop(sequence.conversation, 0)
        self._held_tokens += sequence.prompt_tokens
        self._evict()

    def _begin_decode(self, sequence: Sequence) -> None:
        """Its first token comes with the prompt's last step."""
        self._running += 1
        self._context += sequence.context
        self.generated += 1
        sequence.ends_at = self._steps + sequence.completion_tokens - 1
        heapq.heappush(self._decoding, (sequence.ends_at, next(self._number), sequence))
        set_done(sequence.first)

    def _finish(self, sequence: Sequence) -> None:
        self._end(sequence)
        set_done(sequence.done)

    def _end(self, sequence: Sequence) -> None:
        sequence.gone = True
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            self._running -= 1
            self._context -= sequence.context
            left = max(0.0, sequence.ends_at - self._steps)
            sequence.generated = round(sequence.completion_tokens - left)
        if sequence.started:
            self._held_tokens -= sequence.prompt_tokens
            kept = sequence.prompt_tokens + sequence.generated
            self._cached_tokens += kept - self._cache.pop(sequence.conversation, 0)
            self._cache[sequence.conversation] = kept
            self._evict()

    def _evict(self) -> None:
        while self._cache and self._cached_tokens + self._held_tokens > self._times.cache_tokens:
            _, tokens = self._cache.popitem(last=False)
            self._cached_tokens -= tokens


def set_done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
