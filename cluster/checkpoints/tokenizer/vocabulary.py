"""The vocabulary of a binary: the bytes of every token, as llm_convert writes them. A family has one of four forms.

scored_pieces   sentencepiece pieces with their scores, then added_tokens.json with the score -1000, then empty tokens
                up to vocab_size (which llm_convert refuses). Without a tokenizer.model that fits, tokenizer.json gives
                the same (llm_convert fails then): a piece's score is the negative of its place among the normal
                pieces, as sentencepiece's BPE trainer numbers them. Byte-level pieces are raw bytes; the library's own
                tokenizer knows no merges, so what it makes of a text is not what they are for.
spelled_pieces  the byte-level pieces as tokenizer.json spells them; an id that the tokenizer lacks is empty.
decoded_text    the text that the id alone decodes to; part of a character becomes U+FFFD.
raw_bytes       the raw bytes behind the byte-level pieces, the last token repeated up to vocab_size. Two things differ
                from llm_convert, which fails on the first and shifts all ids after the second: an added token with
                characters that are not byte-level is its UTF-8, and an id in between that the tokenizer lacks is empty.

These bytes matter only to bigdl-llm's own tokenizers; the ids a model is asked are those of the checkpoint's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.artifacts.ggml import VocabToken
from cluster.checkpoints.checkpoint_files import read_json_object
from cluster.checkpoints.tokenizer.byte_level import fallback_byte, raw_bytes
from cluster.checkpoints.tokenizer.config import read_tokenizer_config
from cluster.checkpoints.tokenizer.files import TOKENIZER_JSON, TOKENIZER_MODEL, load_tokenizer
from cluster.checkpoints.tokenizer.json_file import JsonTokenizer
from cluster.checkpoints.tokenizer.model_file import SPACE, load_sentencepiece
from cluster.errors import CheckpointError
from cluster.families import FAMILIES, FamilyName

_ADDED_TOKEN_SCORE = -1000.0
_UNKNOWN = " \u2047 ".encode()  # how sentencepiece renders an unknown piece


def read_vocabulary(checkpoint: Path, family: FamilyName, size: int) -> list[VocabToken]:
    """The `size` tokens of the model. Raises CheckpointError where the tokenizer is missing, does not fit, or could
    not be loaded by a replica."""
    form = FAMILIES[family].vocabulary
    if form == "scored_pieces":
        load_tokenizer(checkpoint)
        return _scored_pieces(checkpoint, size)
    path = checkpoint / TOKENIZER_JSON
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint}: no {TOKENIZER_JSON}; allowed is a tokenizer in that format: load and save the checkpoint's"
            " tokenizer once with transformers"
        )
    tokenizer = JsonTokenizer(path, read_tokenizer_config(checkpoint)).library
    if form == "decoded_text":
        texts = tokenizer.decode_batch([[i] for i in range(size)], skip_special_tokens=False)
        return [VocabToken(text.encode()) for text in texts]
    pieces = {i: piece for piece, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    if form == "spelled_pieces":
        return [VocabToken(pieces.get(i, "").encode()) for i in range(size)]
    return _raw_tokens(path, pieces, size)


def _scored_pieces(checkpoint: Path, size: int) -> list[VocabToken]:
    model, fast = checkpoint / TOKENIZER_MODEL, checkpoint / TOKENIZER_JSON
    if not model.is_file():
        return _without_model(fast, size)
    try:
        tokens = _with_model(model, size)
    except CheckpointError:
        # Llama 3's tokenizer.model is not sentencepiece's.
        if not fast.is_file():
            raise
        return _without_model(fast, size)
    if len(tokens) == size:
        return tokens
    # Tokens that were added since may be in tokenizer.json alone, which is what prompts are tokenized by.
    return _without_model(fast, size) if fast.is_file() else _padded(checkpoint, tokens, size)


def _with_model(path: Path, size: int) -> list[VocabToken]:
    pieces = load_sentencepiece(path)
    tokens = list(_sentencepiece_tokens(pieces))
    if len(tokens) == size:  # llm_convert: "Ignoring added_tokens.json since model matches vocab size without it"
        return tokens
    return tokens + list(_added_tokens(path.with_name("added_tokens.json"), pieces))


def _padded(checkpoint: Path, tokens: list[VocabToken], size: int) -> list[VocabToken]:
    """With the tokens that tokenizer_config.json adds; an id that no file knows is empty."""
    if len(tokens) > size:
        raise CheckpointError(
            f"{checkpoint}: config.json has vocab_size {size}, tokenizer.model and added_tokens.json hold"
            f" {len(tokens)} tokens; allowed are as many or fewer: resize the model's embeddings to its tokenizer"
        )
    added = read_tokenizer_config(checkpoint).added
    texts = (added[i].content.encode() if i in added else b"" for i in range(len(tokens), size))
    return tokens + [VocabToken(text, _ADDED_TOKEN_SCORE) for text in texts]


def _sentencepiece_tokens(pieces: Any) -> Iterator[VocabToken]:
    for i in range(pieces.vocab_size()):
        piece = pieces.id_to_piece(i)
        if pieces.is_unknown(i):
            text = _UNKNOWN
        elif pieces.is_control(i):
            text = b""
        elif pieces.is_byte(i):
            text = bytes([int(piece[3:-1], 16)])  # spelled <0xNN>
        else:
            text = piece.replace(SPACE, " ").encode()
        yield VocabToken(text, pieces.get_score(i))


def _without_model(path: Path, size: int) -> list[VocabToken]:
    """What sentencepiece's model of the same vocabulary would give. An id that tokenizer.json lacks is empty: the
    embeddings of some checkpoints are padded."""
    values = read_json_object(path)
    try:
        pieces = _pieces_with_scores(values["model"])
        added = {int(token["id"]): (str(token["content"]), bool(token["special"])) for token in values["added_tokens"]}
        tokens = list(_tokens_of_pieces(values, pieces, added, size))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not a tokenizer of BPE or Unigram pieces ({error!r:.100}); allowed is one of these, or a"
            " tokenizer.model beside it"
        ) from error
    last, last_added = max(pieces, default=-1), max(added, default=-1)
    # As with tokenizer.model, added tokens are left out where the embeddings are just those of the pieces.
    if last >= size or (last < size - 1 and last_added >= size):
        raise CheckpointError(
            f"{path}: config.json has vocab_size {size}, found ids up to {max(last, last_added)}; allowed are ids below"
            " vocab_size: resize the model's embeddings to its tokenizer"
        )
    return tokens


def _tokens_of_pieces(
    values: dict[str, Any], pieces: dict[int, tuple[str, float | None]], added: dict[int, tuple[str, bool]], size: int
) -> Iterator[VocabToken]:
    """`pieces` by id with the scores they have, `added` with whether the token is special."""
    byte_level = _is_byte_level(values)
    unknown = values["model"].get("unk_token") or "<unk>"
    normal = 0
    for i in range(size):
        if i not in pieces:
            yield VocabToken(added[i][0].encode() if i in added else b"", _ADDED_TOKEN_SCORE)
            continue
        piece, score = pieces[i]
        if i in added and added[i][1]:
            text = _UNKNOWN if piece == unknown else b""
        elif byte_level:
            text = raw_bytes(piece)
        elif (byte := fallback_byte(piece)) is not None:
            text, score = byte, score or 0.0
        else:
            text = piece.replace(SPACE, " ").encode()
        if score is None and i in added:
            score = 0.0
        elif score is None:
            score, normal = -float(normal), normal + 1  # -0.0 first, as sentencepiece writes it
        yield VocabToken(text, score)


def _pieces_with_scores(model: dict[str, Any]) -> dict[int, tuple[str, float | None]]:
    """The model's pieces by id; only Unigram holds scores."""
    if model["type"] == "Unigram":
        return {i: (str(piece), float(score)) for i, (piece, score) in enumerate(model["vocab"])}
    if model["type"] != "BPE":
        raise ValueError(f"model.type {model['type']}")
    return {int(i): (str(piece), None) for piece, i in model["vocab"].items()}


def _is_byte_level(tokenizer: dict[str, Any]) -> bool:
    """Whether its pieces are spelled in GPT-2's byte-level alphabet."""
    return '"ByteLevel"' in json.dumps([tokenizer.get("pre_tokenizer"), tokenizer.get("decoder")])


def _added_tokens(path: Path, pieces: Any) -> Iterator[VocabToken]:
    """Those behind the model's own pieces, some of which the file may name once more."""
    if not path.is_file():
        return
    first = pieces.vocab_size()
    added = read_json_object(path)
    new = {
        text: token
        for text, token in added.items()
        if not (type(token) is int and 0 <= token < first and pieces.id_to_piece(token) == text)
    }
    if not all(type(token) is int for token in new.values()) or sorted(new.values()) != [
        *range(first, first + len(new))
    ]:
        raise CheckpointError(
            f"{path}: found ids {sorted(map(str, new.values()))[:8]}, allowed are {len(new)} ids from {first} on, and"
            " those of the model's own pieces"
        )
    for text in sorted(new, key=lambda text: int(new[text])):
        yield VocabToken(text.encode(), _ADDED_TOKEN_SCORE)


def _raw_tokens(path: Path, pieces: dict[int, str], size: int) -> list[VocabToken]:
    last = max(pieces, default=-1)
    if not 0 <= last < size:
        raise CheckpointError(
            f"{path.parent}: config.json has vocab_size {size}, {path.name} ids up to {last}; allowed are ids below"
            " vocab_size: resize the model's embeddings to its tokenizer"
        )
    return [VocabToken(raw_bytes(pieces.get(min(i, last), ""))) for i in range(size)]
