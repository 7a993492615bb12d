"""Small tokenizers for tests, in the forms that checkpoints have them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import islice, product
from typing import Any, Literal

from cluster.checkpoints.tokenizer.byte_level import BYTE_OF_CHARACTER

# Whose checkpoints have such: a byte-level BPE that puts a BOS in front; sentencepiece's BPE as tokenizer.json; a
# byte-level BPE without BOS.
TokenizerKind = Literal["llama3", "mistral", "qwen2"]

SPECIALS: dict[TokenizerKind, tuple[str, ...]] = {  # the last ids, or (mistral) the first
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("<unk>", "<s>", "</s>"),
    "qwen2": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
}
# The model's own templates, cut down to what tells them apart.
_LLAMA3_CHAT = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_MISTRAL_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %} [INST] {{ message.content }} [/INST]"
    "{% elif message.role == 'assistant' %} {{ message.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
_QWEN2_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What the models' own tokenizer_config.json say.
TOKENIZER_CONFIGS: dict[TokenizerKind, dict[str, Any]] = {
    "llama3": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "chat_template": _LLAMA3_CHAT,
    },
    "mistral": {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "chat_template": _MISTRAL_CHAT,
    },
    "qwen2": {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": _QWEN2_CHAT,
    },
}
# A space, letters, and what merges make of the two.
_SPACE, _LETTERS = "\u2581", "etaoinshrdlucmfwypvbgkjqxz"
MISTRAL_WORDS = (_SPACE, *_LETTERS, *(_SPACE + letter for letter in _LETTERS))
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def tokenizer_files(kind: TokenizerKind, tokens: int) -> dict[str, Any]:
    """The content of tokenizer.json, with ids below `tokens`, and of tokenizer_config.json."""
    tokenizer = sentencepiece_tokenizer(tokens) if kind == "mistral" else added_byte_level_tokenizer(kind, tokens)
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": TOKENIZER_CONFIGS[kind]}


def byte_level_tokenizer(
    tokens: int, first: Sequence[str] = ("<|endoftext|>",), last: Sequence[str] = ()
) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE with `tokens` ids: the special ones `first`, the 256 bytes, merges, and the
    special ones `last`, which the model's vocabulary does not have."""
    pieces, merges = _byte_level_pieces(tokens - len(first) - len(last))
    pieces = [*first, *pieces]
    specials = [*enumerate(first), *enumerate(last, start=len(pieces))]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [special_token(token, text) for token, text in specials],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces[:tokens])}, "merges": merges},
    }


def added_byte_level_tokenizer(kind: TokenizerKind, tokens: int) -> dict[str, Any]:
    """The 256 bytes, merges, and then special tokens that the model's vocabulary does not have."""
    specials = SPECIALS[kind]
    pieces, merges = _byte_level_pieces(tokens - len(specials))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "added_tokens": [special_token(len(pieces) + i, text) for i, text in enumerate(specials)],
        "normalizer": {"type": "NFC"} if kind == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": _begins_with(specials[0], len(pieces)) if kind == "llama3" else byte_level,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": kind == "llama3",
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": merges,
        },
    }


def sentencepiece_tokenizer(tokens: int) -> dict[str, Any]:
    """tokenizer.json of what `sentencepiece_model` gives of MISTRAL_WORDS."""
    vocabulary = {text: i for i, (text, _, _) in enumerate(_sentencepieces(MISTRAL_WORDS, tokens))}
    decoders = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    normalizers = [
        {"type": "Prepend", "prepend": _SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
    ]
    return {
        "version": "1.0",
        "added_tokens": [special_token(i, text) for i, text in enumerate(SPECIALS["mistral"])],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "post_processor": _begins_with("<s>", 1),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": [[word[0], word[1]] for word in MISTRAL_WORDS if len(word) > 1 and word in vocabulary],
        },
    }


def _byte_level_pieces(count: int) -> tuple[list[str], list[list[str]]]:
    """The first `count` of the 256 bytes and what merges make of two of them, then of three, ...; and these merges."""
    characters = sorted(BYTE_OF_CHARACTER, key=BYTE_OF_CHARACTER.__getitem__)
    pieces, merges, shorter = [*characters], [], characters
    while len(pieces) < count:
        pairs = list(islice(product(shorter, characters[97:123]), count - len(pieces)))
        merges += [[left, right] for left, right in pairs]
        shorter = [left + right for left, right in pairs]
        pieces += shorter
    return pieces, merges


def special_token(token: int, content: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token, "content": content, **flags}


def _begins_with(text: str, token: int) -> dict[str, Any]:
    """A post-processor that puts this token in front."""
    first, sequence = {"SpecialToken": {"id": text, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, sequence],
        "pair": [first, sequence, second],
        "special_tokens": {text: {"id": text, "ids": [token], "tokens": [text]}},
    }


def _sentencepieces(words: Sequence[str], tokens: int) -> list[tuple[str, float, int]]:
    """Text, score and kind of each piece: <unk>, <s>, </s>, the 256 bytes, then words."""
    normal, unknown, control, byte = 1, 2, 3, 6
    pieces = [("<unk>", 0.0, unknown), ("<s>", 0.0, control), ("</s>", 0.0, control)]
    pieces += [(f"<0x{i:02X}>", 0.0, byte) for i in range(256)]
    pieces += [(word, -1.5 * i, normal) for i, word in enumerate(words)]
    return pieces[:tokens]


def sentencepiece_model(tokens: int, words: Sequence[str] | None = None) -> bytes:
    """A sentencepiece BPE model of `tokens` pieces, written as the protocol buffer it is. By default its words are of
    no use for a text."""
    if words is None:
        words = [f"{_SPACE}w{i}\u00e9" for i in range(tokens)]
    body = b""
    for text, score, kind in _sentencepieces(words, tokens):
        piece = _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + _varint(kind)
        body += _field(1, piece)
    trainer = b"\x18\x02" + _varint(35 << 3) + b"\x01"  # model_type = BPE, byte_fallback = true
    return body + _field(2, trainer) + _field(3, _field(1, b"identity"))


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])
