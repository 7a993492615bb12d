"""A served model without Ray or an engine: it echoes, so that HTTP and gRPC can be tested on their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from cluster.errors import InvalidRequestError
from cluster.model_config import ModelConfig
from deployments.records import Conversation, EngineTimes, GenerationChunk, GenerationRequest, LoggedToken
from deployments.routing.model_admission import ModelAdmission


class EchoModel:
    """Answers with the words of the prompt (of a conversation's last message), one a chunk, each a token; raises
    `error` before word `error_at`, waits `delay_s` before the first. Every token has log probability -0.5 and, at its
    place, token 0 with -1. `answer`: chunks to answer with instead."""

    def __init__(self, name: str = "echo", ready: bool = True, aliases: tuple[str, ...] = ()) -> None:
        self.config = ModelConfig(name=name, aliases=aliases, family="llama", checkpoint="builtin:llama")
        self.admission = ModelAdmission(self.config, lambda: self.config.replicas.max)
        self.is_ready = ready
        self.awaited = False
        self.error: Exception | None = None
        self.error_at = 0
        self.delay_s = 0.0
        self.cached_tokens = 0
        self.engine_times: EngineTimes | None = None
        self.answer: Sequence[GenerationChunk] = ()
        self.requests: list[GenerationRequest] = []
        self.closed = 0

    def fill(self) -> None:
        """Its replica and its queue have no room for a further request, until what is there has left."""
        queue = self.admission.queue
        for _ in range(self.config.max_ongoing + self.config.queue.max_queued):
            queue.enter(None, 1)

    def ready(self) -> bool:
        return self.is_ready

    def end(self, error: Exception) -> None:
        """It ends by itself."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        self.requests.append(request)
        words = prompt_words(request.prompt)
        prompt_tokens = len(words)
        if request.echo:
            words = words + words
        try:
            pause = self.delay_s  # in parts, of which a machine that stands still takes one away
            for _ in range(10 if pause else 1):
                await asyncio.sleep(pause / 10)
            for chunk in self.answer:
                yield chunk
            offset = 0
            for index, word in enumerate(() if self.answer else words):
                if self.error is not None and index == self.error_at:
                    raise self.error
                last = index == len(words) - 1
                text = word + " "
                logged = LoggedToken(index, text.encode(), -0.5, ((0, b"zero", -1.0),)[: request.logprobs], offset)
                offset += len(text)
                yield GenerationChunk(
                    text=text,
                    token_ids=(index,),
                    finish_reason="stop" if last else None,
                    prompt_tokens=prompt_tokens,
                    completion_tokens=index + 1,
                    logprobs=(logged,) if request.logprobs is not None else (),
                    cached_tokens=self.cached_tokens,
                    engine_times=None if index else self.engine_times,
                    prompt_token_ids=tuple(range(prompt_tokens)) if request.return_token_ids and not index else (),
                )
        finally:
            self.closed += 1

    async def tokenize(self, text: str | Conversation, add_special_tokens: bool, timeout_s: float | None) -> list[int]:
        return [1] * add_special_tokens + [len(word) for word in prompt_words(text)]

    async def tokenizer_info(self, timeout_s: float | None) -> dict[str, Any]:
        return {"tokenizer_class": self.config.name}

    async def detokenize(self, ids: Sequence[int], timeout_s: float | None) -> str:
        return " ".join("x" * id for id in ids)

    async def embed(
        self, prompt: str | tuple[int, ...], max_tokens: int | None, timeout_s: float | None
    ) -> tuple[list[float], int]:
        words = prompt_words(prompt)
        if "unembeddable" in words:
            raise InvalidRequestError("model: this model gives no embeddings", "model")
        return [0.5, -1.0, float(len(words))], len(words)


def prompt_words(prompt: str | tuple[int, ...] | Conversation) -> list[str]:
    if isinstance(prompt, Conversation):
        prompt = prompt.messages[-1].content
    return prompt.split() if isinstance(prompt, str) else [f"t{id}" for id in prompt]
