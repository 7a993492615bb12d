"""The text layer that all engines share: prompts and conversations to token ids, token ids to text as they come, stop
strings; and the token masks of grammars, which need to know what text a token is."""

from __future__ import annotations

import codecs
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.byte_level import raw_bytes
from cluster.errors import ArtifactError, EngineError, InvalidRequestError
from deployments.chat import ChatTemplate, Conversation
from deployments.engines.base import TokenMask
from deployments.grammar import Grammar, GrammarCompiler

SPACE_PIECE = "\u2581"  # sentencepiece's lower one eighth block, which stands for a space


class Tokenizer:
    """The Hugging Face tokenizer of an artifact's folder: local files only, never the checkpoint's own code.

    Decoding goes over bytes (`token_bytes`), a token at a time. It differs from `transformers`' decode in two points:
    of an invalid run of byte tokens the valid characters are kept, and clean_up_tokenization_spaces is not applied;
    both would change text that a stream has given away already.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ArtifactError for a folder whose tokenizer cannot be loaded or is of a kind unknown here."""
        self._tokenizer = _load(folder)
        state = json.loads(self._tokenizer.backend_tokenizer.to_str())
        decoders = {decoder["type"] for decoder in _parts(state.get("decoder"), "decoders")}
        if not decoders & {"ByteLevel", "ByteFallback", "Metaspace"}:
            raise ArtifactError(f"{folder}: found a tokenizer that decodes by {sorted(decoders)}, allowed are ByteLevel"
                                " (BPE) and ByteFallback or Metaspace (sentencepiece)")  # fmt: skip
        self._byte_level = "ByteLevel" in decoders
        # sentencepiece puts a space in front of a text; decoding takes it away again.
        self.strips_first_space = not self._byte_level
        self._added = {
            token["id"]: b"" if token["special"] else str(token["content"]).encode()
            for token in state.get("added_tokens", ())
        }
        self.eos_ids = _eos_ids(folder, self._tokenizer.eos_token_id)
        self._chat = ChatTemplate(self._tokenizer, _json_object(folder / "config.json"))

    def encode(self, text: str, add_special_tokens: bool = True, field: str = "prompt") -> tuple[int, ...]:
        """With the special tokens that the tokenizer adds to a prompt (llama's BOS), unless told otherwise.

        Raises InvalidRequestError, naming `field`, for half a surrogate pair, which JSON can carry and UTF-8 cannot."""
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InvalidRequestError(
                    f"{field}: found half a surrogate pair at character {error.start}, allowed is valid Unicode",
                    field=field,
                ) from None
        return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def encode_conversation(self, conversation: Conversation) -> tuple[int, ...]:
        """What the assistant's next message follows. Special tokens as for a prompt, unless the template wrote them.

        Raises InvalidRequestError for messages that the model's chat template refuses."""
        text = self._chat.render(conversation)
        return self.encode(text, add_special_tokens=not self._chat.wrote_bos(text), field="messages")

    def chat_stops(self) -> tuple[str, ...]:
        """Strings that end the assistant's message, besides the request's own."""
        return self._chat.stops

    def require_same_tokens(self, other: Tokenizer, field: str) -> None:
        """Raises EngineError, naming `field`, where a token id has another text in `other`. Ids that only one of them
        has do not count: vocabularies are padded, and tokens added."""
        texts = {token: text for text, token in self._tokenizer.get_vocab().items()}
        for text, token in other._tokenizer.get_vocab().items():
            if texts.get(token, text) != text:
                raise EngineError(
                    f"{field}: found a tokenizer whose token {token} is {text!r}, allowed is one with the model's"
                    f" tokens: there it is {texts[token]!r}; take a draft model of the same vocabulary"
                )

    def mask(self, grammar: Grammar) -> TokenMask:
        """For one completion from its first token on. The first call takes a second where the vocabulary is large.

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
        return GrammarCompiler(self._tokenizer, self.token_bytes, self.eos_ids)

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
        """UTF-8, perhaps a part of a character; nothing for a special token and for an id beyond the tokenizer."""
        added = self._added.get(token)
        if added is not None:
            return added
        piece = self._tokenizer.backend_tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level:
            return raw_bytes(piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace(SPACE_PIECE, " ").encode()


class IncrementalDetokenizer:
    """Text that is final, as token ids come: bytes that may still become a character are held back, and U+FFFD is given
    only for what can no longer become one. `continues` says that the ids go on after visible text, so that a
    sentencepiece tokenizer's space before the first word is a real one."""

    def __init__(self, tokenizer: Tokenizer, continues: bool = False) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = tokenizer.strips_first_space and not continues
        self.characters = 0  # given so far

    def add(self, ids: Sequence[int]) -> str:
        data = b"".join(map(self._tokenizer.token_bytes, ids))
        if self._strip_space and data:
            self._strip_space = False
            data = data.removeprefix(b" ")
        text = self._decoder.decode(data)
        self.characters += len(text)
        return text

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


class TextStream:
    """Token ids to final text, cut at stop strings."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), continues: bool = False) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer, continues)
        self._stops = StopChecker(stops)

    @property
    def stopped(self) -> bool:
        return self._stops.stopped

    @property
    def characters(self) -> int:
        """Of the text so far, with what is held back because it may begin a stop string."""
        return self._detokenizer.characters

    def add(self, ids: Sequence[int], look: bool = True) -> str:
        """The text that is final now; `look` as StopChecker.add has it."""
        return self._stops.add(self._detokenizer.add(ids), look)

    def end(self) -> str:
        """What was held back; it may still complete a stop string."""
        return self._stops.add(self._detokenizer.end()) + self._stops.end()


def _overlap(text: str, stop: str) -> int:
    """How long the longest end of `text` is that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


def _load(folder: Path) -> Any:
    # transformers advises on import to install PyTorch, which a replica does without on purpose.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ArtifactError(f"{folder}: its tokenizer cannot be loaded: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ArtifactError(f"{folder}: found a {type(tokenizer).__name__}, which has no fast implementation")
    return tokenizer


def _parts(component: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A tokenizer component, or its parts where it is a sequence of several."""
    if component is None:
        return []
    return [component] if component["type"] != "Sequence" else list(component[key])


def _eos_ids(folder: Path, of_tokenizer: int | None) -> frozenset[int]:
    """Every token that ends a text: generation_config.json's, config.json's and the tokenizer's."""
    found: set[int] = set() if of_tokenizer is None else {of_tokenizer}
    for name in ("generation_config.json", "config.json"):
        value = _json_object(folder / name).get("eos_token_id")
        found.update(item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int))
    return frozenset(found)


def _json_object(path: Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
