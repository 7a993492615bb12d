"""One completion: a request's text to tokens, an engine's tokens to text. The same for every engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import TypeVar

from cluster.errors import InvalidRequestError
from deployments.engines.base import Engine, TokenRequest
from deployments.generation.completion import CompletionState
from deployments.generation.text import Tokenizer
from deployments.generation.tool_calls.message import MessageReader
from deployments.observability.tracing import traced_tokens
from deployments.records import Conversation, GenerationChunk, GenerationRequest, Prompt, Tool, ToolUse

T = TypeVar("T")

LONG_TEXT = 4096  # characters, which take a few milliseconds


async def generate_text(
    engine: Engine, tokenizer: Tokenizer, request: GenerationRequest
) -> AsyncGenerator[GenerationChunk, None]:
    """Raises InvalidRequestError, before anything is generated, for what this engine cannot serve."""
    use, grammar, opening = request.tool_use, request.grammar, ""
    form = tokenizer.tool_form(use.forced) if use is not None else None
    if form is not None and use is not None and use.forced:
        grammar, opening = form.grammar(allowed_tools(request.prompt, use), use.parallel), form.opening
    prompt = await off_the_loop(request.prompt, partial(known_prompt, engine, tokenizer, request, opening))
    check(engine, request)
    # A large grammar takes a second to compile.
    mask = await asyncio.to_thread(tokenizer.mask, grammar) if grammar is not None else None
    limit = engine.context - len(prompt) if request.max_tokens is None else request.max_tokens
    eos_ids = (frozenset() if request.ignore_eos else tokenizer.eos_ids) | frozenset(request.stop_token_ids)
    stops = request.stop + (tokenizer.chat_stops() if isinstance(request.prompt, Conversation) else ())
    written = tokenizer if request.skip_special_tokens else tokenizer.with_special_tokens
    message = MessageReader(form, use) if form is not None and use is not None else None
    if form is not None and request.skip_special_tokens:
        written = tokenizer.with_text_of(form.special_tokens)
    state = CompletionState(written, request, prompt, stops, eos_ids)
    if request.echo:
        whole = request.truncate_prompt_tokens is None
        text = request.prompt if isinstance(request.prompt, str) and whole else written.decode(prompt)
        wanted = request.logprobs is not None and request.progress is None
        state.echo(text, await engine.score(prompt, request.logprobs or 0) if wanted else ())
    if request.progress is not None:
        given = state.replay(request.progress)
        if message is not None:
            message.skip(given)
    elif (first := state.begin(limit)) is not None:
        yield first
    if limit == 0:
        return
    tokens = TokenRequest(prompt, limit, request.sampling, eos_ids, request.logprobs, mask, tuple(state.generated))
    chunk: GenerationChunk | None = None
    # Closed before the last chunk goes out, so that the engine does not run on while that one is on its way.
    async with aclosing(traced_tokens(engine.generate(tokens), request.trace, len(prompt))) as batches:
        async for batch in batches:
            chunk = state.add(batch)
            if chunk is not None and message is not None:
                chunk = message.read(chunk)
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
    ids = await off_the_loop(prompt, partial(encoded, tokenizer, prompt, "input"))
    check_prompt(engine, ids, limit, "input", room=0)
    return await engine.embed(ids), len(ids)


async def off_the_loop(prompt: Prompt, work: Callable[[], T]) -> T:
    """What `work` makes of a prompt; in a thread where the text is long: a megabyte takes seconds, in which the other
    streams of the replica would wait."""
    if isinstance(prompt, Conversation):
        characters = sum(len(message.content) for message in prompt.messages)
    else:
        characters = len(prompt) if isinstance(prompt, str) else 0
    return await asyncio.to_thread(work) if characters > LONG_TEXT else work()


def allowed_tools(prompt: Prompt, use: ToolUse) -> list[Tool]:
    return [tool for tool in prompt.tools if tool.name in use.names] if isinstance(prompt, Conversation) else []


def known_prompt(
    engine: Engine, tokenizer: Tokenizer, request: GenerationRequest, opening: str = ""
) -> tuple[int, ...]:
    """The ids of the request's prompt, a conversation with the `opening` of the next message; as they were, for a
    completion that was begun elsewhere."""
    prompt = request.prompt if request.progress is None else request.progress.prompt
    room = 0 if request.max_tokens == 0 else 1
    ids = encoded(tokenizer, prompt, "prompt", request.add_special_tokens, opening)
    field = "messages" if isinstance(prompt, Conversation) else "prompt"
    limit = request.max_prompt_tokens
    last = request.truncate_prompt_tokens
    if last is not None:
        fitting = engine.context - room if limit is None else min(limit, engine.context - room)
        ids = ids[-(fitting if last == -1 else last) :]
    check_prompt(engine, ids, limit, field, room)
    return ids


def encoded(
    tokenizer: Tokenizer, prompt: Prompt, field: str, add_special_tokens: bool = True, opening: str = ""
) -> tuple[int, ...]:
    """The prompt's tokens. Raises InvalidRequestError, naming the field, for what the tokenizer refuses."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, add_special_tokens, field)
    return tokenizer.encode_conversation(prompt, opening) if isinstance(prompt, Conversation) else prompt


def check_prompt(engine: Engine, ids: Sequence[int], limit: int | None, field: str, room: int) -> None:
    """Raises InvalidRequestError, naming the field, for a prompt that the engine cannot serve, that has more than
    `limit` tokens, or that leaves the context no room for `room` more."""
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


def check(engine: Engine, request: GenerationRequest) -> None:
    """Raises InvalidRequestError for other fields that the engine cannot serve."""
    if request.max_tokens is not None and request.max_tokens < 0:
        raise InvalidRequestError(f"max_tokens: found {request.max_tokens}, allowed are 0 and more", "max_tokens")
    if "" in request.stop:
        raise InvalidRequestError("stop: found an empty string, allowed are strings of 1 and more", "stop")
    ids = {"logit_bias": [token for token, _ in request.sampling.logit_bias], "stop_token_ids": request.stop_token_ids}
    for field, tokens in ids.items():
        wrong = next((token for token in tokens if not 0 <= token < engine.vocab_size), None)
        if wrong is not None:
            raise InvalidRequestError(
                f"{field}: found token id {wrong}, allowed are 0 to {engine.vocab_size - 1}", field
            )
