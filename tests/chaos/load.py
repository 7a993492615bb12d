"""A bounded, constant load on a running server, over HTTP and gRPC, that knows what every answer has to be.

Each client asks for the same greedy completion again and again; the first answer, before anything is done to the
server, is the right one. So an answer that is cut, mixed up or missing is found, and counted by its kind.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import grpc
import httpx

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc

Protocol = Literal["http", "grpc"]
PROMPT = "Q: What is CPU? A:"
ANSWER_S = 120  # after which an answer counts as lost
# What a client is told plainly, and may act on.
CLEAR_HTTP = (429, 503)
CLEAR_GRPC = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)


@dataclass
class Counts:
    """`right`: whole and as it must be. `refused`: a clear error before any token. `ended`: a clear error after some.
    `closed`: the HTTP connection broke, which the client's library raises at once; gRPC's has a status for it,
    UNAVAILABLE, which is counted as any other. `wrong`: another text. `lost`: all else."""

    sent: int = 0
    right: int = 0
    refused: int = 0
    ended: int = 0
    closed: int = 0
    wrong: int = 0
    lost: int = 0
    details: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        self.sent += 1
        setattr(self, outcome.kind, getattr(self, outcome.kind) + 1)
        if outcome.kind != "right":
            self.details[outcome.detail] += 1

    @property
    def bad(self) -> int:
        return self.sent - self.right

    def __str__(self) -> str:
        told = f" {dict(self.details)}" if self.details else ""
        return (
            f"{self.sent} sent, {self.right} right, {self.refused} refused, {self.ended} ended,"
            f" {self.closed} closed, {self.wrong} wrong, {self.lost} lost{told}"
        )


class Outcome(NamedTuple):
    kind: Literal["right", "refused", "ended", "closed", "wrong", "lost"]
    text: str = ""
    detail: str = ""


@dataclass
class Client:
    """Asks one model over one protocol for `tokens` tokens at a time, streamed. `key`: an API key."""

    http: str
    grpc: str
    model: str
    protocol: Protocol
    tokens: int
    pause_s: float = 0.0
    key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    async def ask(self, expected: str | None) -> Outcome:
        ask = self._http if self.protocol == "http" else self._grpc
        try:
            outcome = await asyncio.wait_for(ask(), ANSWER_S)
        except asyncio.TimeoutError:
            return Outcome("lost", detail=f"nothing for {ANSWER_S} s")
        if outcome.kind == "right" and expected is not None and outcome.text != expected:
            return Outcome("wrong", outcome.text, f"{outcome.text[:40]!r}…")
        return outcome

    async def _http(self) -> Outcome:
        body = {"model": self.model, "prompt": PROMPT, "max_tokens": self.tokens, "temperature": 0, "stream": True}
        body["ignore_eos"] = True
        text, finished = "", False
        try:
            async with (
                httpx.AsyncClient(timeout=ANSWER_S, trust_env=False) as client,
                client.stream("POST", f"{self.http}/v1/completions", json=body, headers=self.headers) as response,
            ):
                if response.status_code != 200:
                    said = (await response.aread()).decode()[:200]
                    kind = "refused" if response.status_code in CLEAR_HTTP and '"error"' in said else "lost"
                    return Outcome(kind, detail=f"{response.status_code} {said}")
                async for line in response.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        return Outcome("ended" if text else "refused", text, event["error"]["message"])
                    for choice in event["choices"]:
                        text += choice["text"]
                        finished |= choice["finish_reason"] is not None
        except httpx.HTTPError as error:
            broken = isinstance(error, (httpx.NetworkError, httpx.RemoteProtocolError))
            return Outcome("closed" if broken else "lost", text, f"{type(error).__name__} after {len(text)} characters")
        return Outcome("right", text) if finished else Outcome("lost", text, f"cut after {len(text)} characters")

    async def _grpc(self) -> Outcome:
        request = pb.GenerateRequest(
            model=self.model, prompt=PROMPT, max_tokens=self.tokens, temperature=0, ignore_eos=True
        )
        text, finished = "", False
        async with grpc.aio.insecure_channel(self.grpc, options=[("grpc.enable_http_proxy", 0)]) as channel:
            try:
                metadata = tuple(self.headers.items())
                async for message in inference_pb2_grpc.InferenceStub(channel).GenerateStream(
                    request, metadata=metadata
                ):
                    text += message.choice.text
                    finished |= message.choice.HasField("finish_reason")
            except grpc.aio.AioRpcError as error:
                kind: Literal["refused", "ended", "lost"] = "ended" if text else "refused"
                if error.code() not in CLEAR_GRPC or not error.details():
                    kind = "lost"
                return Outcome(kind, text, f"{error.code().name} {error.details()}")
        return Outcome("right", text) if finished else Outcome("lost", text, f"cut after {len(text)} characters")


class Load:
    """Of several clients; `counts` by model."""

    def __init__(self, clients: list[Client]) -> None:
        self._clients = clients
        self._expected: dict[tuple[str, int], str] = {}
        self._ending = False
        self.counts = {client.model: Counts() for client in clients}
        self.latest_right: dict[str, float] = {}
        self.longest_gap_s: dict[str, float] = dict.fromkeys(self.counts, 0.0)

    async def learn(self) -> None:
        """What the right answers are."""
        for client in self._clients:
            key = client.model, client.tokens
            if key not in self._expected:
                outcome = await client.ask(None)
                assert outcome.kind == "right", outcome
                self._expected[key] = outcome.text

    def forget(self, model: str) -> None:
        """Any whole answer is right from now on: the model is about to change."""
        self._expected = {key: text for key, text in self._expected.items() if key[0] != model}

    async def _run(self, client: Client) -> None:
        while not self._ending:
            outcome = await client.ask(self._expected.get((client.model, client.tokens)))
            self.counts[client.model].add(outcome)
            now = time.monotonic()
            if outcome.kind == "right":
                before = self.latest_right.get(client.model, now)
                self.longest_gap_s[client.model] = max(self.longest_gap_s[client.model], now - before)
                self.latest_right[client.model] = now
            await asyncio.sleep(client.pause_s if outcome.kind == "right" else max(client.pause_s, 0.2))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Load]:
        """Within it the clients ask; at its end each has its last answer."""
        await self.learn()
        tasks = [asyncio.create_task(self._run(client)) for client in self._clients]
        try:
            yield self
        finally:
            self._ending = True
            await asyncio.gather(*tasks)

    def take(self) -> dict[str, tuple[Counts, float]]:
        """The counts and the longest gap of each model since the last time; they begin anew."""
        taken = {model: (counts, self.longest_gap_s[model]) for model, counts in self.counts.items()}
        self.counts = {model: Counts() for model in self.counts}
        self.longest_gap_s = dict.fromkeys(self.counts, 0.0)
        return taken

    async def more(self, count: int) -> None:
        """Until every model has so many more answers, of whatever kind."""
        wanted = {model: counts.sent + count for model, counts in self.counts.items()}
        while any(self.counts[model].sent < number for model, number in wanted.items()):
            await asyncio.sleep(0.05)
