"""A completion as a state: what it is at a moment, rebuilt from its request, its prompt's ids and its generated ids.

So a completion can begin in its middle, on another replica, and goes on as if it had never stopped: text that is held
back (a part of a character, what may begin a stop string), stop strings, penalties, grammars and log probabilities are
all functions of these ids. `Progress` is what a caller knows of a completion whose replica it has lost.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from itertools import groupby, takewhile

from deployments.engines.base import Token
from deployments.generation.text import IncrementalDetokenizer, TextStream, Tokenizer
from deployments.records import EngineTimes, FinishReason, GenerationChunk, GenerationRequest, LoggedToken, Progress


class CompletionState:
    """Tokens in, chunks out. `generated`: all token ids so far. The ids of text that is held back wait with it, so that
    the chunks that were given out always tell where to go on."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: GenerationRequest,
        prompt: Sequence[int],
        stops: tuple[str, ...],
        eos_ids: frozenset[int],
    ) -> None:
        """`stops`: the strings that end this completion; `eos_ids`: the tokens that do."""
        self._prompt_tokens, self._min_tokens, self._eos_ids = len(prompt), request.sampling.min_tokens, eos_ids
        continues = any(map(tokenizer.token_bytes, prompt))
        self._prompt_ids = tuple(prompt) if request.return_token_ids else ()
        self._stream = TextStream(tokenizer, stops, continues)
        self._log = TokenLog(tokenizer, continues) if request.logprobs is not None else None
        self.generated: list[int] = []
        self._waiting: list[tuple[int, int]] = []  # ids not given out, each with where in the completion it begins
        self._echoed = ""  # the prompt's text
        self._cached = 0  # of the prompt's tokens
        self._times: EngineTimes | None = None  # until they are given out
        self._final = self._given = 0  # characters of the completion: that are final, that were given out

    def echo(self, text: str, tokens: Sequence[Token]) -> None:
        """Before all else: the prompt's text, and its tokens where their log probabilities are wanted."""
        self._echoed = text
        if self._log is not None:
            self._log.add_prompt(tokens, text)

    def begin(self, limit: int) -> GenerationChunk | None:
        """The first chunk where it is known before any token: an echoed prompt, or, with a `limit` of 0, all."""
        if limit == 0:
            return self._chunk(self._echoed, "length")
        return self._chunk(self._echoed, None) if self._echoed else None

    def replay(self, progress: Progress) -> str:
        """Goes to where `progress` says that the completion was; returns its text up to there, without the prompt's."""
        text = "".join(self._take(Token(token)) for token in progress.token_ids)
        self._final = len(text)
        self._given = progress.characters - len(self._echoed)
        self._waiting.clear()
        self._prompt_ids = ()
        if self._log is not None:
            self._log.end()
        return text[: self._given]

    def add(self, tokens: Sequence[Token]) -> GenerationChunk | None:
        """The next chunk; None while no more text is final. Behind the one with a finish_reason there is none."""
        text, began = "", not self.generated
        for token in tokens:
            if began:
                began, self._times = False, EngineTimes(token.queued_s, token.prefill_s)
            self._cached += token.reused
            text += self._take(token)
            reason: FinishReason | None = "stop" if self._stream.stopped else token.finish_reason
            if reason is not None:
                # The bytes that were held back may complete a stop string.
                text = self._new(text + self._stream.end())
                return self._finished(text, "stop" if self._stream.stopped else reason)
        text = self._new(text)
        if not text:
            return None
        if self._log is not None:
            logged = self._logged(self._given)
            return self._chunk(text, None, self._ids(len(logged)), logged)
        begun = takewhile(lambda waiting: waiting[1] < self._given, self._waiting)
        return self._chunk(text, None, self._ids(sum(1 for _ in begun)))

    def _take(self, token: Token) -> str:
        """The text that is final with it."""
        self.generated.append(token.id)
        self._waiting.append((token.id, self._stream.characters))
        if token.id in self._eos_ids:
            return ""
        if self._log is not None:
            self._log.add(token)
        return self._stream.add([token.id], look=len(self.generated) > self._min_tokens)

    def _new(self, text: str) -> str:
        """What of the `text` that became final was not given out before a replay, and is now."""
        self._final += len(text)
        new = text[max(0, len(text) - (self._final - self._given)) :] if self._final > self._given else ""
        self._given += len(new)
        return new

    def _finished(self, text: str, reason: FinishReason) -> GenerationChunk:
        logged = self._logged(self._given if self._stream.stopped else None)
        return self._chunk(text, reason, self._ids(len(self._waiting)), logged)

    def _logged(self, end: int | None) -> tuple[LoggedToken, ...]:
        """Those not given out of the tokens that begin before this character of the completion; None: all."""
        if self._log is None:
            return ()
        return self._log.end() if end is None else self._log.until(len(self._echoed) + end)

    def _ids(self, count: int) -> tuple[int, ...]:
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return tuple(token for token, _ in taken)

    def _chunk(
        self, text: str, reason: FinishReason | None, ids: tuple[int, ...] = (), logged: tuple[LoggedToken, ...] = ()
    ) -> GenerationChunk:
        if self._log is not None:
            logged = self._log.take_prompt() + logged
        prompt_ids, self._prompt_ids = self._prompt_ids, ()
        times, self._times = self._times, None
        counts = self._prompt_tokens, len(self.generated)
        return GenerationChunk(text, ids, reason, *counts, logged, prompt_ids, self._cached, engine_times=times)


class TokenLog:
    """The log probabilities of a text's tokens, given out as their text is."""

    def __init__(self, tokenizer: Tokenizer, continues: bool) -> None:
        self._tokenizer = tokenizer
        self._text = IncrementalDetokenizer(tokenizer, continues)
        self._offset = 0
        self._begun = b""  # of a character that is not complete yet
        self._prompt: list[LoggedToken] = []
        self._waiting: list[LoggedToken] = []

    def add_prompt(self, tokens: Sequence[Token], text: str) -> None:
        """Before all others: the prompt's tokens, and its text."""
        # Where a text begins with a space itself, sentencepiece puts none in front of it.
        continues = text == " " + self._tokenizer.decode([token.id for token in tokens])
        generated, self._text = self._text, IncrementalDetokenizer(self._tokenizer, continues)
        for _, run in groupby(tokens, key=lambda token: token.id):
            alike = list(run)
            for index, token in enumerate(alike):
                self.add(token)
                self._offset += self._spelled_length(token, len(alike) - index, text)
        self._text, self._offset, self._begun = generated, len(text), b""
        self._prompt, self._waiting = self._waiting, []

    def _spelled_length(self, token: Token, alike: int, text: str) -> int:
        """Of a special token that the prompt spells at this place: it has no text of its own when it is decoded.
        `alike`: how many of it follow each other from here on, so that one that the tokenizer added before a spelled
        one is told from that."""
        spelling = self._tokenizer.special_text(token.id)
        return len(spelling) if spelling and text.startswith(spelling * alike, self._offset) else 0

    def take_prompt(self) -> tuple[LoggedToken, ...]:
        """The prompt's, at the first call."""
        taken, self._prompt = tuple(self._prompt), []
        return taken

    def add(self, token: Token) -> None:
        token_bytes = self._tokenizer.token_bytes
        data = token_bytes(token.id)
        offset = self._offset + _ended(self._begun, data)
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
        given, self._waiting = self._waiting, []
        return tuple(given)


def _ended(begun: bytes, data: bytes) -> int:
    """How many characters of `begun`, which was held back, have ended where `data` begins. A character that cannot go
    on with it is a U+FFFD before it. There may be two: Python's decoder holds back both bytes of a surrogate's
    beginning (0xED 0xA0), of which neither goes on."""
    return max(0, len((begun + data[:1]).decode(errors="replace")) - 1)
