"""What goes from one station of a benchmark to the next. Times are seconds on the clock of the one who measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Prompt = str | tuple[int, ...]
Fields = Mapping[str, Any]
Now = Callable[[], float]
Ending = Literal["whole", "time limit", "interrupted"]


@dataclass(frozen=True)
class Load:
    """`concurrency`: so many workers, each sending one request after another. `rate`: so many requests a second,
    whatever is outstanding."""

    kind: Literal["concurrency", "rate"]
    value: float

    def __str__(self) -> str:
        return f"concurrency {self.value:g}" if self.kind == "concurrency" else f"{self.value:g} requests/s"


@dataclass(frozen=True)
class Server:
    """`label`: A, B, … in the order of the command line. `url`: its scheme decides the protocol."""

    label: str
    url: str
    model: str

    def __str__(self) -> str:
        return f"{self.label}: {self.model} at {self.url}"


@dataclass(frozen=True)
class LoadSettings:
    """`requests` and `duration_s` bound what a run sends, whichever comes first; None is no bound. `baseline`: the
    place in `servers` of the one that all others are compared with."""

    servers: tuple[Server, ...]
    baseline: int | None
    loads: tuple[Load, ...]
    prompts: str
    input_tokens: int
    output_tokens: int
    requests: int | None
    duration_s: float | None
    rounds: int
    warmup: int
    time_limit_s: float
    seed: int


@dataclass(frozen=True)
class Failure:
    """`kind`: a status code, or what happened where there was none."""

    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}" if self.message else self.kind


@dataclass(frozen=True)
class Reply:
    """What came back for one request. `chunks`: when each message of the stream that stands for new tokens arrived; one
    may hold several. Token counts are the server's own, None where it told none."""

    chunks: tuple[float, ...]
    end: float
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    failure: Failure | None = None


@dataclass(frozen=True)
class Sent:
    """One request of a run. `due`: when it was to be sent; all waiting counts from there, so that a server which holds
    up an open loop is charged for it."""

    due: float
    sent: float
    reply: Reply

    @property
    def tokens(self) -> int:
        """Of the output; by chunks where the server does not count."""
        told = self.reply.completion_tokens
        return len(self.reply.chunks) if told is None else told

    @property
    def first_token_s(self) -> float:
        return self.reply.chunks[0] - self.due

    @property
    def latency_s(self) -> float:
        return self.reply.end - self.due

    @property
    def token_s(self) -> float | None:
        """Time per output token after the first; None where there was but one."""
        return (self.reply.end - self.reply.chunks[0]) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def gaps_s(self) -> list[float]:
        """Between a chunk and the next."""
        return [after - before for before, after in zip(self.reply.chunks, self.reply.chunks[1:], strict=False)]


@dataclass(frozen=True)
class Run:
    """One server under one load, once. Times of its requests count from its start. `server`: its place in the settings.
    `cpu_s`: what the load generator itself used, of all cores."""

    server: int
    load: Load
    round: int
    started: str
    seconds: float
    cpu_s: float
    requests: tuple[Sent, ...]
    ending: Ending

    @property
    def succeeded(self) -> tuple[Sent, ...]:
        return tuple(sent for sent in self.requests if sent.reply.failure is None)


class Client(Protocol):
    """One server, one model."""

    async def complete(self, prompt: Prompt, fields: Fields) -> Reply:
        """Streams one completion. `fields`: of the request, beside those that every server knows. Never raises for what
        the server or the network does: that is the reply's failure."""

    async def close(self) -> None: ...


class LoadClock(Protocol):
    def now(self) -> float: ...
    async def sleep_until(self, time: float) -> None: ...
