"""One completion: a request's text to tokens, an engine's tokens to text. The same for every engine."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import takewhile

from cluster.errors import InvalidRequestError
from deployments.chat import Conversation
from deployments.engines.base import Engine, FinishReason, SamplingParams, Token, TokenRequest
from deployments.grammar import Grammar
from deployments.text import IncrementalDetokenizer, TextStream, Tokenizer

Prompt = str | tuple[int, ...] | Conversation


@dataclass(frozen=True)
class GenerationRequest:
    """One completion. `prompt` is text, token ids or a conversation, which the model's chat template turns into text.

    Generation ends after `max_tokens` (None: no bound of its own), where the context is full, at the model's end token
    (unless `ignore_eos`), or at the first of the `stop` strings, which is left out of the text; before
    `sampling.min_tokens` new tokens it ends at neither. `max_tokens` 0 generates nothing. With `echo` the prompt's text
    comes first. `logprobs`: how many of the most likely tokens to report beside each token; None for no log
    probabilities. `timeout_s`: seconds from now until the caller no longer waits. `max_prompt_tokens`: the operator's
    own bound on the prompt.
    """

    request_id: str
    prompt: Prompt
    max_tokens: int | None
    stop: tuple[str, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    ignore_eos: bool = False
    echo: bool = False
    logprobs: int | None = None
    grammar: Grammar | None = None
    timeout_s: float | None = None
    max_prompt_tokens: int | None = None


@dataclass(frozen=True)
class LoggedToken:
    """A token of a text with its log probability (None for a prompt's first token) and the most likely ones at its
    place. `offset`: how many characters of the text (the prompt's included, with echo) come before it."""

    id: int
    data: bytes  # UTF-8, perhaps a part of a character
    logprob: float | None
    top: tuple[tuple[int, bytes, float], ...]
    offset: int


@dataclass(frozen=True)
class GenerationChunk:
    """A piece of the completion: text that is final and the tokens since the chunk before. The last chunk of a
    completion, and only that one, has a finish_reason. `completion_tokens` counts up to this chunk, an end token
    included. `logprobs`: of the tokens whose text this is (with echo, the first chunk has the prompt's), empty where
    none were asked for; an end token and what lies beyond a stop string have none."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[LoggedToken, ...] = ()


async def generate_text(
    engine: Engine, tokenizer: Tokenizer, request: GenerationRequest
) -> AsyncGenerator[GenerationChunk, None]:
    """Raises InvalidRequestError, before anything is generated, for what this engine cannot serve."""
    room = 0 if request.max_tokens == 0 else 1
    prompt = prompt_ids(engine, tokenizer, request.prompt, request.max_prompt_tokens, room=room)
    check(engine, request)
    # A large grammar takes a second to compile.
    mask = await asyncio.to_thread(tokenizer.mask, request.grammar) if request.grammar is not None else None
    limit = engine.context - len(prompt) if request.max_tokens is None else request.max_tokens
    min_tokens, eos_ids = request.sampling.min_tokens, frozenset() if request.ignore_eos else tokenizer.eos_ids
    continues = any(map(tokenizer.token_bytes, prompt))
    text, log = "", TokenLog(tokenizer, continues) if request.logprobs is not None else None
    if request.echo:
        text = request.prompt if isinstance(request.prompt, str) else tokenizer.decode(prompt)
        if log is not None and request.logprobs is not None:
            log.add_prompt(await engine.score(prompt, request.logprobs), text)
    if limit == 0:
        yield GenerationChunk(text, (), "length", len(prompt), 0, log.end() if log is not None else ())
        return
    if text:
        yield GenerationChunk(text, (), None, len(prompt), 0, log.until(len(text)) if log is not None else ())
    stops = request.stop + (tokenizer.chat_stops() if isinstance(request.prompt, Conversation) else ())
    stream = TextStream(tokenizer, stops, continues)
    tokens = TokenRequest(prompt, limit, request.sampling, eos_ids, request.logprobs, mask)
    pending: list[int] = []  # tokens whose text is not final yet
    given, text, count = len(text), "", 0  # `given`: characters, the prompt's included
    reason: FinishReason | None = None
    # Closed before the last chunk goes out, so that the engine does not run on while that one is on its way.
    async with aclosing(engine.generate(tokens)) as batches:
        async for batch in batches:
            for token in batch:
                count += 1
                pending.append(token.id)
                if token.id not in eos_ids:
                    if log is not None:
                        log.add(token)
                    text += stream.add([token.id], look=count > min_tokens)
                reason = "stop" if stream.stopped else token.finish_reason
                if reason is not None:
                    break
            if reason is not None:
                break
            if text:
                given += len(text)
                logged = log.until(given) if log is not None else ()
                yield GenerationChunk(text, tuple(pending), None, len(prompt), count, logged)
                pending.clear()
                text = ""
    text += stream.end()
    logged = ()
    if log is not None:
        logged = log.until(given + len(text)) if stream.stopped else log.end()
    # The bytes that were held back may have completed a stop string.
    reason = "stop" if stream.stopped else reason
    yield GenerationChunk(text, tuple(pending), reason, len(prompt), count, logged)


class TokenLog:
    """The log probabilities of a text's tokens, given out as their text is."""

    def __init__(self, tokenizer: Tokenizer, continues: bool) -> None:
        self._tokenizer = tokenizer
        self._text = IncrementalDetokenizer(tokenizer, continues)
        self._offset = 0
        self._begun = b""  # of a character that is not complete yet
        self._waiting: list[LoggedToken] = []

    def add_prompt(self, tokens: Sequence[Token], text: str) -> None:
        """Before all others: the prompt's tokens, and its text."""
        # Where a text begins with a space itself, sentencepiece puts none in front of it.
        continues = text == " " + self._tokenizer.decode([token.id for token in tokens])
        generated, self._text = self._text, IncrementalDetokenizer(self._tokenizer, continues)
        for token in tokens:
            self.add(token)
        self._text, self._offset, self._begun = generated, len(text), b""

    def add(self, token: Token) -> None:
        token_bytes = self._tokenizer.token_bytes
        data = token_bytes(token.id)
        # A character that cannot go on with this token is a U+FFFD before it.
        offset = self._offset + (not _goes_on(self._begun, data))
        _, complete = codecs.utf_8_decode(self._begun + data, "replace", False)
        self._begun = (self._begun + data)[complete:]
        top = tuple((id, token_bytes(id), logprob) for id, logprob in token.top)
        self._waiting.append(LoggedToken(token.id, data, token.logprob, top, offset))
        self._offset += len(self._text.add([token.id]))

    def until(self, offset: int) -> tuple[LoggedToken, ...]:
        """Those not given yet that begin before `offset`."""
        count = sum(1 for _ in takewhile(lambda token: token.offset < offset, self._waiting))
        given, self._waiting = self._waiting[:count], self._waiting[count:]
        return tuple(given)

    def end(self) -> tuple[LoggedToken, ...]:
        """All that were not given yet."""
        return tuple(self._waiting)


def _goes_on(begun: bytes, data: bytes) -> bool:
    """Whether the character that `begun` are the first bytes of, if any, may go on with `data`."""
    try:
        codecs.utf_8_decode(begun + data[:1], "strict", False)
    except UnicodeDecodeError:
        return not begun
    return True


async def embed_text(
    engine: Engine, tokenizer: Tokenizer, prompt: Prompt, limit: int | None = None
) -> tuple[list[float], int]:
    """The vector of `prompt`, [width], and how many tokens it has, `limit` at most. Raises InvalidRequestError, naming
    `input`."""
    ids = prompt_ids(engine, tokenizer, prompt, limit, field="input", room=0)
    return await engine.embed(ids), len(ids)


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
