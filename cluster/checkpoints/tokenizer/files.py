"""The tokenizer of a checkpoint's or an artifact's folder: local files only, never the checkpoint's own code.

tokenizer.json is the truth where there is one; a tokenizer.model alone is sentencepiece's. Planning a conversion loads
the tokenizer as a replica does, so that what a replica could not use is refused before a weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from cluster.checkpoints.tokenizer.config import configured_ids, read_tokenizer_config
from cluster.checkpoints.tokenizer.json_file import JsonTokenizer
from cluster.checkpoints.tokenizer.model_file import GrammarSource, SentencepieceTokenizer
from cluster.errors import CheckpointError

TOKENIZER_JSON, TOKENIZER_MODEL = "tokenizer.json", "tokenizer.model"


class FileTokenizer(Protocol):
    """Texts to ids and ids to bytes, as the files of one tokenizer have it."""

    names: dict[str, str]  # the text of special tokens by role, as chat templates call them: bos_token, eos_token, ...
    special_ids: frozenset[int]
    eos_id: int | None

    @property
    def strips_first_space(self) -> bool:
        """Whether a text may lose a space at its beginning when it is decoded."""

    @property
    def strips_on(self) -> bool:
        """Whether it goes on losing spaces until there is another character."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Raises ValueError for a text that the tokenizer has no tokens for."""

    def vocabulary(self) -> Mapping[str, int]:
        """Ids by the spelling of their tokens, added ones included."""

    def token_id(self, text: str) -> int | None:
        """Of the token that is spelled `text`."""

    def special_text(self, token: int) -> str:
        """How a special token is spelled in a text that is encoded; nothing for any other id."""

    def token_bytes(self, token: int) -> bytes:
        """UTF-8, perhaps a part of a character; nothing for a special token and for an id beyond the tokenizer."""

    def first_bytes(self, token: int) -> bytes:
        """The same for the first token of a text that has bytes."""

    def grammar_source(self) -> str | GrammarSource:
        """What llguidance makes its own tokenizer of."""


def load_tokenizer(folder: Path) -> FileTokenizer:
    """Raises CheckpointError, naming the file, for a tokenizer that is missing or cannot be used."""
    if (folder / TOKENIZER_JSON).is_file():
        return JsonTokenizer(folder / TOKENIZER_JSON, read_tokenizer_config(folder))
    if (folder / TOKENIZER_MODEL).is_file():
        return SentencepieceTokenizer(folder / TOKENIZER_MODEL, read_tokenizer_config(folder))
    raise CheckpointError(
        f"{folder}: no {TOKENIZER_MODEL} and no {TOKENIZER_JSON}; one of them is needed: copy it from the checkpoint"
        " this one was made from, or load and save the checkpoint's tokenizer once with transformers"
    )


def end_tokens(folder: Path, tokenizer: FileTokenizer) -> frozenset[int]:
    """Every token that ends a text: generation_config.json's, config.json's and the tokenizer's."""
    own = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    return frozenset((*configured_ids(folder, "eos"), *own))
