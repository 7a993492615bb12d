"""Small checkpoints with reproducible random weights, for tests: real Hugging Face folders, made without torch.

The weights come from integer arithmetic alone, so that the same arguments give the same bytes with every numpy on every
machine; tests/reference/digests.json relies on it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from cluster.checkpoints.hyperparameters import read_hyperparameters
from cluster.families import FAMILIES, FamilyName
from tests.random_tokenizer import (
    MISTRAL_WORDS,
    TokenizerKind,
    byte_level_tokenizer,
    sentencepiece_model,
    tokenizer_files,
)

# Tensors of (type, shape, data) by name.
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
# What a repository cloned without git-lfs has in the place of a large file.
LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 499723\n"
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
    architecture: str | None = None  # of config.json, the family's first where None
    tokenizer: TokenizerKind | None = None  # None: a llama has sentencepiece's model, the others a byte-level BPE
    # Which of token embedding and output matrix are stored; None: both, or the embedding alone where config.json ties.
    stored: Literal["both", "output"] | None = None


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

_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# What engine openvino alone runs. Feed-forwards are no first multiple (llama) or not four times the width.
OPENVINO_SHAPES: dict[str, Shape] = {
    "llama3": Shape(
        "llama",
        width=128,
        heads=8,
        layers=3,
        vocabulary=320,
        feed_forward=448,
        type="BF16",
        config=(
            ("num_key_value_heads", 2),
            ("rope_theta", 500000.0),
            ("rope_scaling", _LLAMA3_SCALING),
            ("rms_norm_eps", 1e-5),
            ("tie_word_embeddings", True),
            ("bos_token_id", 315),
            ("eos_token_id", [316, 319]),
        ),
        seed=21,
        tokenizer="llama3",
    ),
    "llama-biases": Shape(
        "llama",
        layers=2,
        feed_forward=192,
        type="F32",
        config=(("attention_bias", True), ("rms_norm_eps", 1e-4), ("rope_scaling", {"type": "linear", "factor": 4.0})),
        seed=22,
    ),
    "llama-one-head": Shape("llama", heads=1, layers=2, feed_forward=192, seed=23),
    "mistral": Shape(
        "llama",
        width=128,
        heads=4,
        layers=2,
        feed_forward=448,
        type="BF16",
        config=(("num_key_value_heads", 2), ("rms_norm_eps", 1e-5), ("sliding_window", 16)),
        seed=24,
        architecture="MistralForCausalLM",
        tokenizer="mistral",
    ),
    "qwen2": Shape(
        "llama",
        width=128,
        heads=4,
        layers=3,
        vocabulary=384,
        tokens=330,
        feed_forward=320,
        type="BF16",
        config=(
            ("num_key_value_heads", 2),
            ("rope_theta", 1000000.0),
            ("bos_token_id", 327),
            ("eos_token_id", 329),
            ("use_sliding_window", False),
            ("sliding_window", 32),
            ("tie_word_embeddings", True),
        ),
        seed=25,
        architecture="Qwen2ForCausalLM",
        tokenizer="qwen2",
    ),
    "gptneox-shallow": Shape(
        "gptneox",
        layers=3,
        feed_forward=192,
        config=(("rotary_emb_base", 1000000), ("layer_norm_eps", 1e-6), ("hidden_act", "gelu_new")),
        seed=26,
    ),
    "bloom-epsilon": Shape("bloom", layers=2, config=(("layer_norm_epsilon", 1e-6),), seed=27),
    "starcoder-epsilon": Shape(
        "starcoder", layers=2, feed_forward=128, config=(("layer_norm_epsilon", 1e-6),), seed=28
    ),
}

# Forms of the two matrices in which transformers does not do what config.json alone says: a different output matrix is
# stored though config.json ties, or that matrix alone; and the form that is rare in a family, untied or tied.
_TIED = (("tie_word_embeddings", True),)
_UNTIED = (("tie_word_embeddings", False),)
TIED_SHAPES: dict[str, Shape] = {
    "llama-output-differs": Shape("llama", feed_forward=192, config=_TIED, seed=31, stored="both"),
    "llama-output-alone": Shape("llama", feed_forward=192, config=_TIED, seed=32, stored="output"),
    "gptneox-output-differs": Shape("gptneox", config=_TIED, seed=33, stored="both"),
    "gptneox-output-alone": Shape("gptneox", config=_TIED, seed=34, stored="output"),
    "bloom-output-differs": Shape("bloom", seed=35, stored="both"),
    "bloom-output-alone": Shape("bloom", seed=36, stored="output"),
    "bloom-untied": Shape("bloom", config=_UNTIED, seed=37),
    "starcoder-output-differs": Shape("starcoder", seed=38, stored="both"),
    "starcoder-output-alone": Shape("starcoder", seed=39, stored="output"),
    "starcoder-untied": Shape("starcoder", config=_UNTIED, seed=40),
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
    model, layout = read_hyperparameters(folder, config, shape.family), FAMILIES[shape.family].layout
    left_out = layout.output if model.tied else None
    if shape.stored is not None:
        left_out = {"both": None, "output": layout.embedding}[shape.stored]
    shapes = {
        rule.source: rule.source_shape for rule in FAMILIES[shape.family].tensors(model) if rule.source != left_out
    }
    tensors = {}
    for name in sorted(shapes):
        full_name = name if base_names or name == layout.output else layout.prefix + name
        tensors[full_name] = (shape.type, shapes[name], random_weights(name, shapes[name], shape.seed, shape.type))
    (write or write_weights)(folder, tensors, shards)
    return folder


def random_weights(name: str, shape: tuple[int, ...], seed: int, kind: str = "F16") -> bytes:
    """Numbers between -1/8 and 1/8, as the given type. Each tensor begins with 64 zeros, then 64 negative zeros, and
    has ties of greatest magnitude, where rounding and signs show."""
    numbers = uniform_numbers(name, int(np.prod(shape)), seed) / np.float32(8)
    numbers[:64], numbers[64:128] = 0.0, -0.0
    numbers[192:256:2], numbers[193:256:2] = 0.125, -0.125
    return as_type(numbers, kind)


def uniform_numbers(name: str, count: int, seed: int) -> npt.NDArray[np.float32]:
    """Between -1 and 1: SplitMix64 of the position."""
    state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state += np.uint64(zlib.crc32(name.encode()) + (seed << 32))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    return ((state >> np.uint64(40)).astype(np.float32) - np.float32(1 << 23)) / np.float32(1 << 23)


def as_type(numbers: npt.NDArray[np.float32], kind: str) -> bytes:
    if kind == "BF16":
        return (numbers.view(np.uint32) >> 16).astype("<u2").tobytes()
    return numbers.astype({"F16": "<f2", "F32": "<f4"}[kind]).tobytes()


def write_lively_weights(folder: Path, tensors: Tensors, shards: int = 1) -> None:
    """For `write_random_checkpoint`: other numbers, with which logits depend on every tensor as those of a trained
    model do: the gains of norms are around 1, and matrices neither shrink nor blow up what goes through them."""
    lively: Tensors = {}
    for name, (kind, shape, _) in tensors.items():
        numbers = uniform_numbers(name, int(np.prod(shape)), seed=1)
        if len(shape) == 2:
            numbers *= np.float32((3 / shape[1]) ** 0.5)
        elif name.endswith(".weight"):
            numbers = 1 + numbers / np.float32(4)
        lively[name] = (kind, shape, as_type(numbers.astype(np.float32), kind))
    write_weights(folder, lively, shards)


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
    architecture = shape.architecture or family.architectures[0]
    model_type = family.model_types[family.architectures.index(architecture)]
    common: dict[str, Any] = {"architectures": [architecture], "model_type": model_type}
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
    if shape.tokenizer is not None:
        for name, content in tokenizer_files(shape.tokenizer, tokens).items():
            (folder / name).write_text(json.dumps(content))
    if shape.family == "llama" and shape.tokenizer in (None, "mistral"):
        words = MISTRAL_WORDS if shape.tokenizer == "mistral" else None
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(tokens, words))
        added = {f"<added_{i}>": i for i in range(tokens, shape.vocabulary)}
        if added:
            (folder / "added_tokens.json").write_text(json.dumps(added))
    if shape.family != "llama":
        (folder / "tokenizer.json").write_text(json.dumps(byte_level_tokenizer(tokens)))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
