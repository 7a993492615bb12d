"""Look-alikes of published traces: lengths, arrivals, conversations and clients, drawn from a seed.

Azure's LLM inference traces of 2023 (conversation and code): tokens in and out by their published 50th, 90th and 99th
percentiles, rate, and coefficient of variation (CV) of the times between arrivals. How many turns a conversation has is
WildChat's mean (2.5).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import NamedTuple

MOST_TOKENS = 8192


class Lengths(NamedTuple):
    """Tokens, by percentiles: least, p50, p90, p99, most. Between two of them the logarithm is uniform."""

    least: int
    p50: int
    p90: int
    p99: int
    most: int

    def draw(self, random: Random) -> int:
        place = random.random()
        for (below, low), (above, high) in pairwise(zip((0.0, 0.5, 0.9, 0.99, 1.0), self, strict=True)):
            if place <= above:
                part = (place - below) / (above - below)
                return round(low * (high / low) ** part)
        raise AssertionError("a random number is at most 1")


@dataclass(frozen=True)
class TraceKind:
    """`rate`: requests a second of the published trace; `cv`: of its times between arrivals; `turns`: mean of a
    conversation, 1 where no request continues another; `think_s`: from a turn to the next one at least, and as much
    again in the mean; `peak`: most requests in one second."""

    name: str
    rate: float
    cv: float
    prompt: Lengths
    completion: Lengths
    turns: float
    think_s: float = 20.0
    peak: float = math.inf


CONVERSATION = TraceKind(
    "conversation", 5.53, 1.09, Lengths(20, 1020, 2735, 4142, 5000), Lengths(10, 129, 424, 601, 1000), turns=2.5
)
CODE = TraceKind(
    "code", 2.57, 13.2, Lengths(100, 1469, 5194, 7436, 7437), Lengths(6, 13, 55, 252, 1000), turns=1.0, peak=67.0
)
KINDS = {kind.name: kind for kind in (CONVERSATION, CODE)}


class Ask(NamedTuple):
    """One request. `shared`: so many of its prompt's tokens an earlier turn of `conversation` had, with its answer."""

    at: float
    client: str
    conversation: int
    prompt_tokens: int
    completion_tokens: int
    shared: int


def renewal(rate: float, cv: float, peak: float, random: Random) -> Iterator[float]:
    """Arrival times without end; the times between them have a Gamma distribution of shape 1/cv²: 1 is Poisson, a
    greater CV makes bursts with silence between them. What would come faster than `peak` a second waits for its turn.
    The first one is anywhere in a mean time."""
    shape = 1 / cv**2
    due = at = random.random() / rate
    while True:
        yield at
        due += random.gammavariate(shape, 1 / (shape * rate))
        at = max(due, at + 1 / peak)


def streams(rate: float, kind: TraceKind) -> int:
    """A greater load is not one client who asks faster but more of them: as many independent arrivals, each like the
    published trace."""
    return max(1, round(rate / kind.rate))


def shares(clients: int, exponent: float = 1.0) -> list[float]:
    """Parts of the load, Zipf's: a few heavy clients, many light ones."""
    weights = [1 / place**exponent for place in range(1, clients + 1)]
    return [weight / sum(weights) for weight in weights]


def arrivals(kind: TraceKind, rate: float, seconds: float, random: Random) -> Iterator[tuple[float, int]]:
    """Times below `seconds`, in order, and the number of the stream that each is of."""
    number = streams(rate, kind)

    def tagged(stream: int, part: float) -> Iterator[tuple[float, int]]:
        for at in renewal(rate * part, kind.cv, kind.peak * max(1.0, rate * part / kind.rate), Random(random.random())):
            if at >= seconds:
                return
            yield at, stream

    return heapq.merge(*(tagged(stream, part) for stream, part in enumerate(shares(number))))


def trace(kind: TraceKind, rate: float, seconds: float, seed: int) -> list[Ask]:
    """Requests of about `rate` a second, in the order of their arrival. The turns of a conversation are arrivals of one
    stream that lie `think_s` or more apart; their prompts grow."""
    random = Random(seed)
    lengths = Random(random.random())
    open_turns: dict[int, list[tuple[float, int, list[int], int]]] = {}  # of a stream: due, conversation, prompts, seen
    asks: list[Ask] = []
    conversations = 0
    for at, stream in arrivals(kind, rate, seconds, random):
        waiting = open_turns.setdefault(stream, [])
        completion = kind.completion.draw(lengths)
        if waiting and waiting[0][0] <= at:
            _, conversation, prompts, seen = heapq.heappop(waiting)
        else:
            conversations += 1
            conversation, seen = conversations, 0
            turns = (
                1 + math.floor(math.log(1 - lengths.random()) / math.log(1 - 1 / kind.turns)) if kind.turns > 1 else 1
            )
            prompts = sorted((kind.prompt.draw(lengths) for _ in range(turns)), reverse=True)
        prompt = min(prompts.pop(), MOST_TOKENS - completion)
        asks.append(Ask(at, f"client-{stream}", conversation, prompt, completion, min(seen, prompt)))
        if prompts:
            due = at + kind.think_s + lengths.expovariate(1 / kind.think_s)
            heapq.heappush(waiting, (due, conversation, prompts, prompt + completion))
    return asks


def mixed(traces: dict[str, list[Ask]]) -> list[Ask]:
    """Of several clients, by their names, in the order of arrival."""
    asks: list[Ask] = []
    conversations = 0
    for client, own in traces.items():
        asks += [ask._replace(client=client, conversation=ask.conversation + conversations) for ask in own]
        conversations += len(own)
    return sorted(asks, key=lambda ask: ask.at)


def steps_of(kind: TraceKind, rates: list[tuple[float, float]], seed: int) -> list[Ask]:
    """Of several loads one after the other: (requests a second, seconds) each."""
    asks: list[Ask] = []
    begun, conversations = 0.0, 0
    for place, (rate, seconds) in enumerate(rates):
        part = trace(kind, rate, seconds, seed + place)
        asks += [ask._replace(at=ask.at + begun, conversation=ask.conversation + conversations) for ask in part]
        begun += seconds
        conversations += len(part)
    return asks
