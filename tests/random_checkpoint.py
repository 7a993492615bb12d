"""Small checkpoints with reproducible random weights, for tests: real Hugging Face folders, made without torch.

The weights come from integer arithmetic alone, so that the same arguments give the same bytes with every numpy on every
machine; tests/reference/digests.json relies on it.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cluster.byte_level import BYTE_OF_CHARACTER
from cluster.families import FAMILIES, FamilyName
from cluster.hyperparameters import read_hyperparameters
from cluster.layouts import LAYOUTS, tensor_rules

# Tensors of (type, shape, data) by name.
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
WriteWeights = Callable[[Path, Tensors, int], None]


class Shape(NamedTuple):
    """What a random checkpoint is like; `config` overrides keys of config.json."""

    family: FamilyName
    width: int = 64
    heads: int = 4
    layers: int = 2
    vocabulary: int = 300
    feed_forward: int | None = None
    tokens: int | None = None  # how many the tokenizer has, vocabulary where None
    type: str = "F16"
    config: tuple[tuple[str, Any], ...] = ()
    seed: int = 0


# One checkpoint a line of what the converter does differently; digests.json has llm_convert's result for each. They are
# for converting: libbloom makes its buffer a few bytes too small for the bloom ones and dies (not from 6 layers on).
SHAPES: dict[str, Shape] = {
    "llama": Shape("llama", layers=26, feed_forward=192),
    "llama-bf16": Shape("llama", width=128, heads=2, layers=26, feed_forward=384, type="BF16", seed=1),
    "llama-fp32": Shape("llama", width=64, heads=2, layers=26, feed_forward=256, type="F32", seed=2),
    "llama-tied": Shape("llama", layers=26, feed_forward=192, config=(("tie_word_embeddings", True),), seed=3),
    "llama-grouped": Shape(
        "llama", width=128, heads=8, layers=26, feed_forward=384, config=(("num_key_value_heads", 2),), seed=15
    ),
    "llama-added-tokens": Shape("llama", layers=26, feed_forward=192, vocabulary=303, tokens=300, seed=4),
    "gptneox": Shape("gptneox", layers=16, tokens=290, seed=5),
    "gptneox-sequential": Shape(
        "gptneox",
        width=128,
        heads=4,
        layers=16,
        type="F32",
        config=(("use_parallel_residual", False), ("rotary_pct", 1.0)),
        seed=6,
    ),
    "gptneox-bf16": Shape("gptneox", layers=16, type="BF16", vocabulary=257, seed=7),
    "gptneox-tied": Shape("gptneox", layers=16, config=(("tie_word_embeddings", True),), seed=8),
    "bloom": Shape("bloom", layers=3, tokens=290, seed=9),
    "bloom-wide": Shape("bloom", width=192, heads=6, layers=1, type="F32", seed=10),
    "bloom-bf16": Shape("bloom", layers=1, type="BF16", seed=11),
    "starcoder": Shape("starcoder", layers=3, tokens=290, seed=12),
    "starcoder-wide": Shape("starcoder", width=192, heads=6, layers=1, type="F32", seed=13),
    "starcoder-bf16": Shape("starcoder", layers=1, type="BF16", seed=14),
}


def write_random_checkpoint(
    folder: Path, shape: Shape, *, shards: int = 1, base_names: bool = False, write: WriteWeights | None = None
) -> Path:
    """Writes config.json, weights and tokenizer into `folder` (made if missing) and returns it. With `base_names` the
    tensors lack the prefix of the base model, as in checkpoints of bloom; `write` writes them, by default as
    safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model_config(shape) | dict(shape.config)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(folder, shape)
    model, layout = read_hyperparameters(folder, config, shape.family), LAYOUTS[shape.family]
    shapes = {rule.source: rule.source_shape for rule in tensor_rules(shape.family, model)}
    tensors = {}
    for name in sorted(shapes):
        full_name = name if base_names or name == layout.output else layout.prefix + name
        tensors[full_name] = (shape.type, shapes[name], random_weights(name, shapes[name], shape.seed, shape.type))
    (write or write_weights)(folder, tensors, shards)
    return folder


def random_weights(name: str, shape: tuple[int, ...], seed: int, kind: str = "F16") -> bytes:
    """Numbers between -1/8 and 1/8 (SplitMix64 of the position), as the given type. Each tensor begins with 64 zeros,
    then 64 negative zeros, and has ties of greatest magnitude, where rounding and signs show."""
    count = int(np.prod(shape))
    state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state += np.uint64(zlib.crc32(name.encode()) + (seed << 32))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    numbers = ((state >> np.uint64(40)).astype(np.float32) - np.float32(1 << 23)) / np.float32(1 << 26)
    numbers[:64], numbers[64:128] = 0.0, -0.0
    numbers[192:256:2], numbers[193:256:2] = 0.125, -0.125
    if kind == "BF16":
        return (numbers.view(np.uint32) >> 16).astype("<u2").tobytes()
    return numbers.astype({"F16": "<f2", "F32": "<f4"}[kind]).tobytes()


def write_weights(folder: Path, tensors: Tensors, shards: int = 1) -> None:
    """As model.safetensors, or as `shards` files with an index."""
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file, part = f"model-{i + 1:05}-of-{shards:05}.safetensors", names[i::shards]
        write_safetensors(folder / file, {name: tensors[name] for name in part})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": sum(len(t[2]) for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_safetensors(path: Path, tensors: Tensors) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (kind, shape, data) in tensors.items():
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"".join(t[2] for t in tensors.values()))


def model_config(shape: Shape) -> dict[str, Any]:
    family = FAMILIES[shape.family]
    common = {"architectures": [family.architectures[0]], "model_type": family.model_types[0]}
    common |= {"vocab_size": shape.vocabulary, "bos_token_id": 1, "eos_token_id": 2}
    wide = shape.feed_forward or 4 * shape.width
    if shape.family == "bloom":
        return common | {"hidden_size": shape.width, "n_head": shape.heads, "n_layer": shape.layers}
    if shape.family == "starcoder":
        small = {"n_embd": shape.width, "n_head": shape.heads, "n_layer": shape.layers, "n_positions": 96}
        return common | small | {"n_inner": wide, "multi_query": True, "activation_function": "gelu_pytorch_tanh"}
    sizes = {"hidden_size": shape.width, "num_attention_heads": shape.heads, "num_hidden_layers": shape.layers}
    common |= sizes | {"intermediate_size": wide, "max_position_embeddings": 128, "tie_word_embeddings": False}
    if shape.family == "llama":
        return common | {"hidden_act": "silu", "rms_norm_eps": 1e-6}
    return common | {"hidden_act": "gelu", "rotary_pct": 0.25, "use_parallel_residual": True}


def write_tokenizer(folder: Path, shape: Shape) -> None:
    tokens = shape.tokens or shape.vocabulary
    if shape.family == "llama":
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(tokens))
        added = {f"<added_{i}>": i for i in range(tokens, shape.vocabulary)}
        if added:
            (folder / "added_tokens.json").write_text(json.dumps(added))
        return
    (folder / "tokenizer.json").write_text(json.dumps(byte_level_tokenizer(tokens)))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def byte_level_tokenizer(tokens: int) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE with `tokens` ids: one special, the 256 bytes, then merges."""
    characters = sorted(BYTE_OF_CHARACTER, key=BYTE_OF_CHARACTER.__getitem__)
    pieces, merges = ["<|endoftext|>", *characters], []
    for left in characters:
        for right in characters[97:123]:
            if len(pieces) < tokens:
                pieces.append(left + right)
                merges.append([left, right])
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": pieces[0], **special}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces[:tokens])}, "merges": merges},
    }


def sentencepiece_model(tokens: int) -> bytes:
    """A sentencepiece BPE model, written as the protocol buffer it is: <unk>, <s>, </s>, the 256 bytes, then words."""
    normal, unknown, control, byte = 1, 2, 3, 6
    pieces = [("<unk>", 0.0, unknown), ("<s>", 0.0, control), ("</s>", 0.0, control)]
    pieces += [(f"<0x{i:02X}>", 0.0, byte) for i in range(256)]
    pieces += [(f"\u2581w{i}\u00e9", -1.5 * i, normal) for i in range(tokens - len(pieces))]
    body = b""
    for text, score, kind in pieces[:tokens]:
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
