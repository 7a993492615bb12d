"""One completion: a request's text to tokens, an engine's tokens to text. The same for every engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from cluster.errors import InvalidRequestError
from deployments.engines.base import Engine, TokenRequest
from deployments.generation.completion import CompletionState
from deployments.generation.text import Tokenizer
from deployments.records import Conversation, GenerationChunk, GenerationRequest, Prompt


async def generate_text(
    engine: Engine, tokenizer: Tokenizer, request: GenerationRequest
) -> AsyncGenerator[GenerationChunk, None]:
    """Raises InvalidRequestError, before anything is generated, for what this engine cannot serve."""
    prompt = known_prompt(engine, tokenizer, request)
    check(engine, request)
    # A large grammar takes a second to compile.
    mask = await asyncio.to_thread(tokenizer.mask, request.grammar) if request.grammar is not None else None
    limit = engine.context - len(prompt) if request.max_tokens is None else request.max_tokens
    eos_ids = frozenset() if request.ignore_eos else tokenizer.eos_ids
    stops = request.stop + (tokenizer.chat_stops() if isinstance(request.prompt, Conversation) else ())
    state = CompletionState(tokenizer, request, prompt, stops, eos_ids)
    if request.echo:
        text = request.prompt if isinstance(request.prompt, str) else tokenizer.decode(prompt)
        wanted = request.logprobs is not None and request.progress is None
        state.echo(text, await engine.score(prompt, request.logprobs or 0) if wanted else ())
    if request.progress is not None:
        state.replay(request.progress)
    elif (first := state.begin(limit)) is not None:
        yield first
    if limit == 0:
        return
    tokens = TokenRequest(prompt, limit, request.sampling, eos_ids, request.logprobs, mask, tuple(state.generated))
    chunk: GenerationChunk | None = None
    # Closed before the last chunk goes out, so that the engine does not run on while that one is on its way.
    async with aclosing(engine.generate(tokens)) as batches:
        async for batch in batches:
            chunk = state.add(batch)
            if chunk is not None and chunk.finish_reason is not None:
                break
            if chunk is not None:
                yield chunk
    assert chunk is not None, "the last token has a finish_reason, and the last chunk with it"
    yield chunk


async def embed_text(
    engine: Engine, tokenizer: Tokenizer, prompt: Prompt, limit: int | None = None
) -> tuple[list[float], int]:
    """The vector of `prompt`, [width], and how many tokens it has, `limit` at most. Raises InvalidRequestError, naming
    `input`."""
    ids = prompt_ids(engine, tokenizer, prompt, limit, field="input", room=0)
    return await engine.embed(ids), len(ids)


def known_prompt(engine: Engine, tokenizer: Tokenizer, request: GenerationRequest) -> tuple[int, ...]:
    """The ids of the request's prompt; as they were, for a completion that was begun elsewhere."""
    prompt = request.prompt if request.progress is None else request.progress.prompt
    room = 0 if request.max_tokens == 0 else 1
    return prompt_ids(engine, tokenizer, prompt, request.max_prompt_tokens, room=room)


def prompt_ids(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: Prompt,
    limit: int | None = None,
    field: str = "prompt",
    room: int = 1,
) -> tuple[int, ...]:
    """The prompt's tokens. Raises InvalidRequestError, naming the field, for one that the engine cannot serve, that has
    more than `limit` tokens, or that leaves the context no room for `room` more."""
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt, field=field)
    elif isinstance(prompt, Conversation):
        ids, field = tokenizer.encode_conversation(prompt), "messages"
    else:
        ids = prompt
    if not ids:
        raise InvalidRequestError(
            f"{field}: found no tokens, at least 1 is needed: this model's tokenizer adds none of its own", field
        )
    if limit is not None and len(ids) > limit:
        raise InvalidRequestError(
            f"{field}: found {len(ids)} tokens, this server allows {limit}; send a shorter one", field
        )
    if len(ids) + room > engine.context:
        raise InvalidRequestError(
            f"{field}: found {len(ids)} tokens, allowed are {engine.context - room}: the model's context holds"
            f" {engine.context} tokens, prompt and completion together; send a shorter one",
            field,
        )
    wrong = next((token for token in ids if not 0 <= token < engine.vocab_size), None)
    if wrong is not None:
        raise InvalidRequestError(f"{field}: found token id {wrong}, allowed are 0 to {engine.vocab_size - 1}", field)
    return ids


def check(engine: Engine, request: GenerationRequest) -> None:
    """Raises InvalidRequestError for other fields that the engine cannot serve."""
    if request.max_tokens is not None and request.max_tokens < 0:
        raise InvalidRequestError(f"max_tokens: found {request.max_tokens}, allowed are 0 and more", "max_tokens")
    if "" in request.stop:
        raise InvalidRequestError("stop: found an empty string, allowed are strings of 1 and more", "stop")
    for token, _ in request.sampling.logit_bias:
        if not 0 <= token < engine.vocab_size:
            raise InvalidRequestError(
                f"logit_bias: found token id {token}, allowed are 0 to {engine.vocab_size - 1}", "logit_bias"
            )
