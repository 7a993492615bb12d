"""A tokenizer.json: the `tokenizers` library on the file itself, whatever class tokenizer_config.json names.

Its decoder is read once, and a token's text then comes from the token alone, so that text can be streamed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from tokenizers.models import BPE

from cluster.checkpoints.checkpoint_files import read_without_mark
from cluster.checkpoints.tokenizer.byte_level import fallback_byte, raw_bytes
from cluster.checkpoints.tokenizer.config import TokenizerConfig, configured_ids
from cluster.errors import CheckpointError


class Decoding(NamedTuple):
    """What a tokenizer's decoder does to the spelling of each token, in this order.

    `replaced`: texts and what stands for them. `space`: the character that Metaspace turns into spaces. `byte_level`:
    GPT-2's alphabet. `byte_fallback`: <0xNN> is a byte. At a text's beginning, one character `stripped` goes away, and
    with `drops_first` all of Metaspace's spaces in the first token."""

    replaced: tuple[tuple[str, str], ...] = ()
    space: str = ""
    byte_level: bool = False
    byte_fallback: bool = False
    stripped: str = ""
    drops_first: bool = False

    def token_bytes(self, piece: str, first: bool = False) -> bytes:
        """Of a token that is spelled `piece`; of a text's first token where `first`."""
        data = fallback_byte(piece) if self.byte_fallback else None
        if data is None:
            for old, new in self.replaced:
                piece = piece.replace(old, new)
            if self.space:
                piece = piece.replace(self.space, "" if first and self.drops_first else " ")
            data = raw_bytes(piece) if self.byte_level else piece.encode()
        return data.removeprefix(self.stripped.encode()) if first else data


class JsonTokenizer:
    """Texts to ids and ids to bytes by a tokenizer.json."""

    strips_on = False  # only the first token of a text can lose spaces

    def __init__(self, path: Path, config: TokenizerConfig) -> None:
        """Raises CheckpointError, naming the file, for what cannot be loaded or used."""
        self.library = _load(path)
        self._decoding = read_decoding(path, self.library)
        added = self.library.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, entry in added.items() if entry.special)
        self.names = {role: text for role, text in config.names.items() if text is not None}
        for role in ("bos", "eos"):
            ids = [token for token in configured_ids(path.parent, role) if token in self.special_ids]
            if f"{role}_token" not in config.names and ids:
                self.names[f"{role}_token"] = added[ids[0]].content
        eos = self.names.get("eos_token")
        self.eos_id = None if eos is None else self.token_id(eos)

    @property
    def strips_first_space(self) -> bool:
        return self._decoding.stripped != "" or self._decoding.drops_first

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """With the special tokens of the file's own post_processor. Raises ValueError for a text that the tokenizer has
        no tokens for."""
        try:
            ids: list[int] = self.library.encode(text, add_special_tokens=add_special_tokens).ids
        except BaseException as error:
            raise ValueError(_reason(error)) from error
        return ids

    def vocabulary(self) -> dict[str, int]:
        return self.library.get_vocab(with_added_tokens=True)

    def token_id(self, text: str) -> int | None:
        return self.library.token_to_id(text)

    def special_text(self, token: int) -> str:
        return str(self.library.id_to_token(token)) if token in self.special_ids else ""

    def token_bytes(self, token: int) -> bytes:
        """UTF-8, perhaps a part of a character; nothing for a special token and for an id beyond the tokenizer."""
        return self._bytes(token, first=False)

    def first_bytes(self, token: int) -> bytes:
        """The same for the first token of a text that has bytes."""
        return self._bytes(token, first=True)

    def _bytes(self, token: int, first: bool) -> bytes:
        piece = self.library.id_to_token(token) if _is_id(token) and token not in self.special_ids else None
        return b"" if piece is None else self._decoding.token_bytes(piece, first)

    def grammar_source(self) -> str:
        """The tokenizer as JSON, which llguidance reads."""
        return self.library.to_str()


def _is_id(token: int) -> bool:
    """The library's ids have 32 bits."""
    return 0 <= token < 1 << 32


def _load(path: Path) -> Tokenizer:
    content = read_without_mark(path)
    try:
        tokenizer = Tokenizer.from_str(content.decode())
        # Files may ask for a fixed length, which would cut prompts.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode("")  # shows whether the special tokens of its post_processor are there
    except BaseException as error:
        raise CheckpointError(f"{path}: not a tokenizer: {_reason(error)}; download it again") from error
    return tokenizer


def _reason(error: BaseException) -> str:
    """What the library says. Its exceptions are bare Exceptions, and where its Rust code panics, a BaseException."""
    if isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime":
        return str(error)[:300]
    raise error


def read_decoding(path: Path, tokenizer: Tokenizer) -> Decoding:
    """Raises CheckpointError, naming `path`, for a decoder that cannot be streamed or that is unknown here."""
    empty = Tokenizer(BPE())  # has nothing but the decoder, as the library has understood it
    if tokenizer.decoder is not None:
        empty.decoder = tokenizer.decoder
    state = json.loads(empty.to_str())["decoder"]
    decoding = Decoding()
    for part in _parts(state):
        known = _with_part(decoding, part)
        if known is None:
            raise _unknown(path, part)
        decoding = known
    if decoding == Decoding():
        raise _unknown(path, state)
    if decoding.stripped and not any(part["type"] == "Fuse" for part in _parts(state)):
        raise _unknown(path, {"type": "Strip, of every token"})
    return decoding


def _with_part(decoding: Decoding, part: dict[str, Any]) -> Decoding | None:
    """None for what is not known."""
    kind = part["type"]
    if kind == "ByteLevel":
        return decoding._replace(byte_level=True)
    if kind == "ByteFallback":
        return decoding._replace(byte_fallback=True)
    if kind == "Fuse":
        return decoding
    if kind == "Metaspace":
        return decoding._replace(space=part["replacement"], drops_first=part.get("prepend_scheme") != "never")
    if kind == "Replace" and "String" in part["pattern"]:
        return decoding._replace(replaced=(*decoding.replaced, (part["pattern"]["String"], part["content"])))
    if kind == "Strip" and part["stop"] == 0 and part["start"] <= 1:
        return decoding._replace(stripped=part["content"]) if part["start"] else decoding
    return None


def _parts(state: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A decoder, or its parts where it is a sequence of several."""
    if state is None:
        return []
    return [part for item in state["decoders"] for part in _parts(item)] if state["type"] == "Sequence" else [state]


def _unknown(path: Path, found: dict[str, Any] | None) -> CheckpointError:
    return CheckpointError(
        f"{path}: decoder: found {'none' if found is None else found['type']}, allowed are ByteLevel (BPE) or"
        " sentencepiece's Replace of a text, ByteFallback, Fuse, Strip of one first character, Metaspace"
    )
