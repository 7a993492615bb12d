"""An engine that gives the tokens of a script, and completions made with it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from deployments.engines.base import Token, TokenRequest
from deployments.generation.generation import generate_text
from deployments.generation.text import Tokenizer
from deployments.records import (
    FinishReason,
    GenerationChunk,
    GenerationRequest,
    LoggedToken,
    Prompt,
)
from tests.conftest import DEMOS

LLAMA, BLOOM = Tokenizer(DEMOS / "llama"), Tokenizer(DEMOS / "bloom")


class ScriptedEngine:
    """Gives the tokens of its script, `batch` at a time, as the Engine contract says."""

    name, vocab_size, threads = "scripted", 512, 1

    def __init__(self, script: tuple[int, ...], batch: int = 1, context: int = 200) -> None:
        self.script, self.batch, self.context = script, batch, context
        self.requests: list[TokenRequest] = []
        self.given = 0
        self.closed = False

    async def generate(self, request: TokenRequest) -> AsyncGenerator[list[Token], None]:
        self.requests.append(request)
        limit = min(request.max_tokens, self.context - len(request.prompt))
        tokens = []
        assert tuple(request.generated) == self.script[: len(request.generated)]
        for count, token in list(enumerate(self.script[:limit], 1))[len(request.generated) :]:
            stop = token in request.eos_token_ids
            reason: FinishReason | None = "stop" if stop else "length" if count == limit else None
            logged = (-1.0 * count, ((token, -1.0 * count),)) if request.logprobs is not None else ()
            tokens.append(Token(token, reason, *logged))
            if stop:
                break
        try:
            for start in range(0, len(tokens), self.batch):
                self.given = start + self.batch
                yield tokens[start : start + self.batch]
        finally:
            self.closed = True

    async def score(self, prompt: Sequence[int], logprobs: int) -> list[Token]:
        first, *others = prompt
        return [Token(first), *(Token(id, logprob=-0.5, top=((id, -0.5),)[:logprobs]) for id in others)]

    async def embed(self, prompt: Sequence[int]) -> list[float]:
        return [float(len(prompt))]

    def info(self) -> dict[str, str | int | float]:
        return {}

    def close(self) -> None: ...


def request(
    prompt: Prompt = "Q:", max_tokens: int | None = 50, stop: tuple[str, ...] = (), **fields: Any
) -> GenerationRequest:
    return GenerationRequest("r1", prompt, max_tokens, stop, **fields)


async def collect(engine: ScriptedEngine, tokenizer: Tokenizer, wanted: GenerationRequest) -> list[GenerationChunk]:
    return [chunk async for chunk in generate_text(engine, tokenizer, wanted)]


def text_of(chunks: list[GenerationChunk]) -> str:
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])
    assert chunks[-1].finish_reason is not None
    assert sum(len(chunk.token_ids) for chunk in chunks) == chunks[-1].completion_tokens
    return "".join(chunk.text for chunk in chunks)


def logged(chunks: list[GenerationChunk]) -> list[LoggedToken]:
    return [token for chunk in chunks for token in chunk.logprobs]
