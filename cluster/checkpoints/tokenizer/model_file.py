"""A tokenizer.model without a tokenizer.json: sentencepiece itself on the file.

What is not sentencepiece's is done as transformers' LlamaTokenizer does it: BOS and EOS as tokenizer_config.json says,
and tokens that were added, or control a text, are found in it first.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from cluster.checkpoints.tokenizer.byte_level import fallback_byte
from cluster.checkpoints.tokenizer.config import AddedToken, TokenizerConfig
from cluster.errors import CheckpointError

SPACE = "\u2581"  # sentencepiece's lower one eighth block, which stands for a space


class SentencepieceTokenizer:
    """Texts to ids and ids to bytes by a tokenizer.model."""

    def __init__(self, path: Path, config: TokenizerConfig) -> None:
        """Raises CheckpointError, naming the file, for what is no model of sentencepiece."""
        self._pieces = load_sentencepiece(path)
        proto = self._proto()
        normalizer = proto.normalizer_spec
        self._unknown_text = str(proto.trainer_spec.unk_surface).encode()
        adds_space = normalizer.add_dummy_prefix and config.flags.get("add_prefix_space", True)
        self.strips_first_space = bool(adds_space or normalizer.remove_extra_whitespaces)
        self.strips_on = bool(normalizer.remove_extra_whitespaces)
        self._whole = self._pieces if adds_space else self._continuing
        # What follows an added token: a text of its own, or (`"legacy": false`) the same text, which goes on.
        self._rest = self._whole if config.flags.get("legacy", True) or not adds_space else self._continuing
        self._added = dict(_added_tokens(self._pieces, config))
        self._split = _splitter(self._added)
        self._ids = {entry.content: token for token, entry in self._added.items()}
        self.special_ids = frozenset(token for token, entry in self._added.items() if entry.special)
        self.names = {role: text for role, text in config.names.items() if text is not None}
        bos, self.eos_id = self._named("bos", self._pieces.bos_id()), self._named("eos", self._pieces.eos_id())
        self._named("unk", self._pieces.unk_id())
        self._before = [bos] if config.flags.get("add_bos_token", True) and bos is not None else []
        self._after = [self.eos_id] if config.flags.get("add_eos_token", False) and self.eos_id is not None else []

    def _named(self, role: str, own: int) -> int | None:
        """The id of the token that the files name, or of the model's own (-1: none), which is named then."""
        text = self.names.get(f"{role}_token")
        found = None if text is None else self.token_id(text)
        if found is not None or own < 0:
            return found
        self.names[f"{role}_token"] = self._pieces.id_to_piece(own)
        return own

    @functools.cached_property
    def _continuing(self) -> Any:
        """A processor that puts no space in front of a text."""
        proto = self._proto()
        proto.normalizer_spec.add_dummy_prefix = False
        return SentencePieceProcessor(model_proto=proto.SerializeToString())

    def _proto(self) -> Any:
        return ModelProto.FromString(self._pieces.serialized_model_proto())

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = [*self._before] if add_special_tokens else []
        for i, part in enumerate(self._split(text)):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += (self._rest if i else self._whole).encode(part)
        return ids + self._after if add_special_tokens else ids

    def vocabulary(self) -> dict[str, int]:
        size = self._pieces.vocab_size()
        return dict(zip(self._pieces.id_to_piece(list(range(size))), range(size), strict=True)) | self._ids

    def token_id(self, text: str) -> int | None:
        piece = int(self._pieces.piece_to_id(text))  # the unknown piece's where there is none
        return self._ids.get(text, piece if self._pieces.id_to_piece(piece) == text else None)

    def special_text(self, token: int) -> str:
        return self._added[token].content if token in self.special_ids else ""

    def token_bytes(self, token: int) -> bytes:
        """UTF-8, perhaps a part of a character; nothing for a special token and for an id beyond the tokenizer. The
        unknown token is the text that sentencepiece writes for it."""
        added = self._added.get(token)
        if added is not None and token != self._pieces.unk_id():
            return b"" if added.special else added.content.encode()
        if not 0 <= token < self._pieces.vocab_size():
            return b""
        if self._pieces.is_unknown(token):
            return self._unknown_text
        piece = str(self._pieces.id_to_piece(token))
        data = fallback_byte(piece) if self._pieces.is_byte(token) else None
        return piece.replace(SPACE, " ").encode() if data is None else data

    def first_bytes(self, token: int) -> bytes:
        """The same for the first token of a text that has bytes."""
        data = self.token_bytes(token)
        plain = 0 <= token < self._pieces.vocab_size() and not self._pieces.is_byte(token) and token not in self._added
        return data.removeprefix(b" ") if plain and not self._pieces.is_unknown(token) else data

    def grammar_source(self) -> GrammarSource:
        return GrammarSource(self)

    def encode_rest(self, text: str) -> list[int]:
        """The tokens of what follows in a text that has begun."""
        ids: list[int] = self._continuing.encode(text)
        return ids


class GrammarSource:
    """What llguidance's TokenizerWrapper asks for: bytes by token, and the tokens of text that a grammar leaves no
    choice about."""

    def __init__(self, tokenizer: SentencepieceTokenizer) -> None:
        texts = {token: text for text, token in tokenizer.vocabulary().items()}
        self.tokens = [
            texts.get(i, "").encode() if i in tokenizer.special_ids else tokenizer.token_bytes(i)
            for i in range(1 + max(texts))
        ]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self.bos_token_id = None
        self.eos_token_id = tokenizer.eos_id
        self._encode = tokenizer.encode_rest
        special = tokenizer.special_ids
        self._of_bytes = {data: i for i, data in enumerate(self.tokens) if data and i not in special}
        self._longest = max(map(len, self._of_bytes), default=0)

    def __call__(self, data: bytes) -> list[int]:
        ids = self._encode(data.decode("utf-8", "ignore"))
        # sentencepiece may change a text (full-width letters, runs of spaces), which a grammar does not.
        return ids if b"".join(self.tokens[i] for i in ids) == data else list(self._greedy(data))

    def _greedy(self, data: bytes) -> Iterator[int]:
        """The longest token at each place, as far as there is one."""
        start = 0
        while start < len(data):
            ends = range(min(len(data), start + self._longest), start, -1)
            token = next((i for end in ends if (i := self._of_bytes.get(data[start:end])) is not None), None)
            if token is None:
                return
            yield token
            start += len(self.tokens[token])


def load_sentencepiece(path: Path) -> Any:
    """A SentencePieceProcessor. Raises CheckpointError, naming the file."""
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{path}: not a sentencepiece model: download it again ({error})") from error


def _added_tokens(pieces: Any, config: TokenizerConfig) -> Iterator[tuple[int, AddedToken]]:
    """Control and unknown pieces, and what the files add. An added token that is an ordinary piece of the model stays
    sentencepiece's, which finds it by itself."""
    size = pieces.vocab_size()
    named = set(config.names.values())
    for i in range(size):
        if pieces.is_control(i) or pieces.is_unknown(i) or pieces.id_to_piece(i) in named:
            yield i, AddedToken(pieces.id_to_piece(i), special=True)
    for token, entry in config.added.items():
        if entry.special or token >= size or entry.content != pieces.id_to_piece(token):
            yield token, entry


def _splitter(added: dict[int, AddedToken]) -> Callable[[str], Iterator[str | int]]:
    """Cuts a text into the ids of added tokens and the texts before, between and after them; of two tokens that begin
    together the longer one is found. White space that belongs to a token is left out."""
    found = sorted((token for token in added if added[token].content), key=lambda token: -len(added[token].content))
    pattern = re.compile("|".join(f"({_pattern(added[token])})" for token in found) or "(?!)")

    def split(text: str) -> Iterator[str | int]:
        end = 0
        for match in pattern.finditer(text):
            yield text[end : match.start()]
            yield found[(match.lastindex or 0) - 1]
            end = match.end()
        yield text[end:]

    return split


def _pattern(entry: AddedToken) -> str:
    pattern = re.escape(entry.content)
    if entry.single_word:
        pattern = rf"(?<!\w){pattern}(?!\w)"
    return (r"\s*" if entry.lstrip else "") + pattern + (r"\s*" if entry.rstrip else "")
