"""The text layer that all engines share: prompts and conversations to token ids, token ids to text as they come, stop
strings; and the token masks of grammars, which need to know what text a token is."""

from __future__ import annotations

import codecs
import copy
import functools
from collections.abc import Sequence
from pathlib import Path

from cluster.checkpoints.folder import CONFIG_FILE
from cluster.checkpoints.tokenizer.config import TOKENIZER_CONFIG_FILE, read_optional, read_tokenizer_config
from cluster.checkpoints.tokenizer.files import end_tokens, load_tokenizer
from cluster.errors import ArtifactError, CheckpointError, EngineError, InvalidRequestError
from cluster.model_config import ToolParser
from deployments.engines.base import TokenMask
from deployments.generation.chat import ChatTemplate
from deployments.generation.grammar import GrammarCompiler
from deployments.generation.tool_calls.reader import CallReader
from deployments.records import Conversation, Grammar


class Tokenizer:
    """The tokenizer of an artifact's folder: what its files say (cluster/checkpoints/tokenizer/files.py), over bytes.

    Decoding goes a token at a time (`token_bytes`). It differs from the `tokenizers` library's decode, and from
    sentencepiece's, in two points: of an invalid run of byte tokens the valid characters are kept, and
    clean_up_tokenization_spaces is not applied; both would change text that a stream has given away already.
    """

    def __init__(self, folder: Path, tool_parser: ToolParser | None = None) -> None:
        """`tool_parser`: the form of tool calls, where the chat template does not tell.

        Raises ArtifactError for a folder whose tokenizer cannot be loaded or is of a kind unknown here."""
        try:
            self._files = load_tokenizer(folder)
            self.eos_ids = end_tokens(folder, self._files)
            told = read_tokenizer_config(folder)
            # What clients with the same tokenizer want to know of it.
            self.info = {**read_optional(folder / TOKENIZER_CONFIG_FILE), "chat_template": told.template}
            config = read_optional(folder / CONFIG_FILE)
            self._chat = ChatTemplate(told.template, self._files.names, config, tool_parser, told.tool_template)
        except CheckpointError as error:
            raise ArtifactError(str(error)) from error
        self.strips_first_space = self._files.strips_first_space
        self._spelled: dict[int, bytes] = {}  # special tokens that have a text

    @functools.cached_property
    def with_special_tokens(self) -> Tokenizer:
        """The same tokenizer, but special tokens have the text that they are spelled with."""
        other, special = copy.copy(self), self._files.special_ids
        other._spelled = {id: text.encode() for text, id in self._files.vocabulary().items() if id in special}
        return other

    def with_text_of(self, special_tokens: Sequence[str]) -> Tokenizer:
        """The same tokenizer, but those of these texts that are special tokens have them as their text."""
        other, ids = copy.copy(self), self.special_ids(special_tokens)
        other._spelled = {id: text for id, text in self.with_special_tokens._spelled.items() if id in ids}
        return other

    def encode(self, text: str, add_special_tokens: bool = True, field: str = "prompt") -> tuple[int, ...]:
        """With the special tokens that the tokenizer adds to a prompt (llama's BOS), unless told otherwise.

        Raises InvalidRequestError, naming `field`, for what the tokenizer has no tokens for, and for half a surrogate
        pair, which JSON can carry and UTF-8 cannot."""
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InvalidRequestError(
                    f"{field}: found half a surrogate pair at character {error.start}, allowed is valid Unicode",
                    field=field,
                ) from None
        try:
            return tuple(self._files.encode(text, add_special_tokens))
        except ValueError as error:
            raise InvalidRequestError(f"{field}: the model's tokenizer refuses it: {error}", field=field) from error

    def encode_conversation(self, conversation: Conversation, opening: str = "") -> tuple[int, ...]:
        """What the assistant's next message, or the rest of it behind its `opening`, follows. Special tokens as for a
        prompt, unless the template wrote them.

        Raises InvalidRequestError for messages that the model's chat template refuses."""
        text, wanted = self._chat.render(conversation) + opening, conversation.add_special_tokens
        return self.encode(text, not self._chat.wrote_bos(text) if wanted is None else wanted, field="messages")

    def tool_form(self, forced: bool) -> type[CallReader]:
        """The form in which the model calls tools; of `forced` calls there is one for each model. Raises
        InvalidRequestError where the model would not be told of the tools, or its form is not known."""
        return self._chat.tool_form(forced)

    def chat_stops(self) -> tuple[str, ...]:
        """Strings that end the assistant's message, besides the request's own."""
        return self._chat.stops

    def require_same_tokens(self, other: Tokenizer, field: str) -> None:
        """Raises EngineError, naming `field`, where a token id has another text in `other`. Ids that only one of them
        has do not count: vocabularies are padded, and tokens added."""
        texts = {token: text for text, token in self._files.vocabulary().items()}
        for text, token in other._files.vocabulary().items():
            if texts.get(token, text) != text:
                raise EngineError(
                    f"{field}: found a tokenizer whose token {token} is {text!r}, allowed is one with the model's"
                    f" tokens: there it is {texts[token]!r}; take a draft model of the same vocabulary"
                )

    def mask(self, grammar: Grammar) -> TokenMask:
        """For one completion from its first token on. The first call takes some seconds where the vocabulary is large.

        What the grammar describes are the bytes of the new tokens: the space that a sentencepiece text loses where no
        visible prompt comes before it counts. Raises InvalidRequestError for a grammar that cannot be used."""
        try:
            grammars = self._grammars
        except ValueError as error:  # llguidance knows fewer kinds of tokenizers
            raise InvalidRequestError(
                f"{grammar.field}: this model's tokenizer cannot follow grammars: {error}", field=grammar.field
            ) from error
        return grammars.mask(grammar)

    @functools.cached_property
    def _grammars(self) -> GrammarCompiler:
        return GrammarCompiler(self._files, self.eos_ids)

    def decode(self, ids: Sequence[int], vocab_size: int | None = None) -> str:
        """The text of `ids` without special tokens; what an IncrementalDetokenizer gives in all for them.

        With the model's `vocab_size`, raises InvalidRequestError for ids outside of it. Where the tokenizer has fewer
        tokens than the model, the others have no text."""
        wrong = None if vocab_size is None else next((token for token in ids if not 0 <= token < vocab_size), None)
        if vocab_size is not None and wrong is not None:
            raise InvalidRequestError(
                f"tokens: found token id {wrong}, allowed are 0 to {vocab_size - 1}", field="tokens"
            )
        detokenizer = IncrementalDetokenizer(self)
        return detokenizer.add(ids) + detokenizer.end()

    def token_bytes(self, token: int) -> bytes:
        """UTF-8, perhaps a part of a character; nothing for a special token, unless `with_special_tokens`, and for an
        id beyond the tokenizer."""
        return self._spelled.get(token) or self._files.token_bytes(token)

    def special_text(self, token: int) -> str:
        """How a special token is spelled in a prompt; nothing for any other id."""
        return self._files.special_text(token)

    def special_ids(self, texts: Sequence[str]) -> frozenset[int]:
        """The special tokens without a text among those that are spelled as one of `texts`."""
        special = self._files.special_ids.difference(self._spelled)
        return frozenset(id for text in texts if (id := self._files.token_id(text)) in special)

    def leading_bytes(self, token: int) -> bytes | None:
        """The bytes of a token where nothing of the text has come before it; None where nothing has come still."""
        if not self.token_bytes(token):
            return None
        data = self._spelled.get(token) or self._files.first_bytes(token)
        return None if self._files.strips_on and not data else data


class IncrementalDetokenizer:
    """Text that is final, as token ids come: bytes that may still become a character are held back, and U+FFFD is given
    only for what can no longer become one. `continues` says that the ids go on after visible text, so that a
    sentencepiece tokenizer's space before the first word is a real one."""

    def __init__(self, tokenizer: Tokenizer, continues: bool = False) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = continues or not tokenizer.strips_first_space
        self.characters = 0  # given so far

    def add(self, ids: Sequence[int]) -> str:
        text = self._decoder.decode(b"".join(map(self._bytes, ids)))
        self.characters += len(text)
        return text

    def _bytes(self, token: int) -> bytes:
        if self._begun:
            return self._tokenizer.token_bytes(token)
        data = self._tokenizer.leading_bytes(token)
        self._begun = data is not None
        return data or b""

    def end(self) -> str:
        """What was held back. No `add` may follow."""
        return self._decoder.decode(b"", final=True)


class StopChecker:
    """Cuts a text at the stop string that is complete first (of two that end together, at the longer one), wherever
    the pieces it comes in begin and end. Text that could be the beginning of a stop string is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are not empty strings."""
        self._stops = tuple(stops)
        self._held = ""
        self._skipped = 0  # of the characters held, from the first on: no stop string counts that ends in them
        self.stopped = False

    def add(self, text: str, look: bool = True) -> str:
        """The text that is final now; nothing more once `stopped`. Without `look` no stop string that ends in `text`
        counts, but one that begins there may."""
        if self.stopped:
            return ""
        self._held += text
        if not look:
            self._skipped = len(self._held)
        matches = [(start + len(stop), start) for stop in self._stops if (start := self._find(stop)) >= 0]
        if matches:
            self.stopped = True
            return self._held[: min(matches)[1]]
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        final, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._skipped = max(0, self._skipped - len(final))
        return final

    def _find(self, stop: str) -> int:
        return self._held.find(stop, max(0, self._skipped - len(stop) + 1))

    def end(self) -> str:
        """What was held back and turned out to be no stop string."""
        return "" if self.stopped else self._held

    def stop(self) -> str:
        """The text ends here: what was held back."""
        text, self.stopped = self.end(), True
        return text


class TextStream:
    """Token ids to final text, cut at stop strings. A special token has no text, so that one spelled as a stop string
    is known by its id."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), continues: bool = False) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer, continues)
        self._stops = StopChecker(stops)
        self._stop_ids = tokenizer.special_ids(stops)

    @property
    def stopped(self) -> bool:
        return self._stops.stopped

    @property
    def characters(self) -> int:
        """Of the text so far, with what is held back because it may begin a stop string."""
        return self._detokenizer.characters

    def add(self, ids: Sequence[int], look: bool = True) -> str:
        """The text that is final now; `look` as StopChecker.add has it."""
        end = next((i for i, token in enumerate(ids) if look and token in self._stop_ids), None)
        text = self._stops.add(self._detokenizer.add(ids[:end]), look)
        if end is not None:
            text += self._stops.add(self._detokenizer.end()) + self._stops.stop()
        return text

    def end(self) -> str:
        """What was held back; it may still complete a stop string."""
        return self._stops.add(self._detokenizer.end()) + self._stops.end()


def _overlap(text: str, stop: str) -> int:
    """How long the longest end of `text` is that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
