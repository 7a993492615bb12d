"""Look-alikes of the four checkpoints that the reference example takes by default: random weights under the shapes,
tensor names, files and config spellings of those repositories, at full size or small.

Known, from copies of the configs in public source, from the transformers that wrote the files, and from users' reports:

llama      decapoda-research/llama-7b-hf: config.json as here, with its own spelling of the architecture and ids 0 and 1
           for bos and eos; empty strings as special tokens; 33 files, one a layer and one with the rest; in each layer
           the buffer rotary_emb.inv_freq.
gptneox    togethercomputer/RedPajama-INCITE-7B-Chat: config.json as that of the 3B model, at the width of 6.9 billion
           weights: attention and feed-forward one after the other, the whole head rotated.
bloom      bigscience/bloomz-7b1: the sizes; one pytorch_model.bin of 14.1 GB (nmntz/bloomz.cpp#35).
starcoder  bigcode/gpt_bigcode-santacoder: config.json as here; 49,157 tokens under 49,280 rows.

Assumed: gptneox in two files, cut where save_pretrained cuts at 10 GB, with the buffers that GPTNeoXAttention saved
then, and 50,254 pieces and 23 added tokens; bloom's spelling `n_embed`, its prefix `transformer.` without an lm_head,
and 250,680 tokens; starcoder in one file of fp32; each tokenizer_config.json but llama's; and the text of all pieces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cluster.checkpoints.hyperparameters import read_hyperparameters
from cluster.families import FAMILIES, FamilyName
from tests.bench.make_checkpoint import numbers
from tests.random_tokenizer import MISTRAL_WORDS, byte_level_tokenizer, sentencepiece_model
from tests.torch_files import state_pickle, write_archive

_END = "<|endoftext|>"
_SHARD_BYTES = 10_000_000_000  # of save_pretrained in 2023
_MENDED = "LlamaForCausalLM"
# numpy's and safetensors' word for what a file's storages hold.
_TYPES = {"F16": "<f2", "F32": "<f4", "BOOL": "?"}


class Stored(NamedTuple):
    type: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[bytes]]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(_TYPES[self.type]).itemsize


CONFIGS: dict[FamilyName, dict[str, Any]] = {
    "llama": {
        "architectures": ["LLaMAForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "initializer_range": 0.02,
        "max_sequence_length": 2048,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "pad_token_id": -1,
        "rms_norm_eps": 1e-06,
        "torch_dtype": "float16",
        "transformers_version": "4.27.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "gptneox": {
        "architectures": ["GPTNeoXForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 16384,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "model_type": "gpt_neox",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.28.1",
        "use_cache": True,
        "use_parallel_residual": False,
        "vocab_size": 50432,
    },
    "bloom": {
        "apply_residual_connection_post_layernorm": False,
        "architectures": ["BloomForCausalLM"],
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_dropout": 0.0,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "bloom",
        "n_embed": 4096,
        "n_inner": None,
        "n_layer": 30,
        "num_attention_heads": 32,
        "offset_alibi": 100,
        "pad_token_id": 3,
        "pretraining_tp": 1,
        "seq_length": 2048,
        "skip_bias_add": True,
        "unk_token_id": 0,
        "use_cache": True,
        "vocab_size": 250880,
    },
    "starcoder": {
        "activation_function": "gelu_pytorch_tanh",
        "architectures": ["GPTBigCodeForCausalLM"],
        "attention_softmax_in_fp32": True,
        "attn_pdrop": 0.1,
        "bos_token_id": 49152,
        "embd_pdrop": 0.1,
        "eos_token_id": 49152,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt_bigcode",
        "multi_query": True,
        "n_embd": 2048,
        "n_head": 16,
        "n_inner": 8192,
        "n_layer": 24,
        "n_positions": 2048,
        "resid_pdrop": 0.1,
        "scale_attention_softmax_in_fp32": True,
        "scale_attn_weights": True,
        "summary_type": "cls_index",
        "transformers_version": "4.28.0.dev0",
        "use_cache": True,
        "vocab_size": 49280,
    },
}
# Sizes that bigdl-llm's runtimes load, as in tests/random_checkpoint.py.
SMALL: dict[FamilyName, dict[str, Any]] = {
    "llama": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "num_hidden_layers": 32,
        "vocab_size": 320,
    },
    "gptneox": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 16,
        "vocab_size": 320,
    },
    "bloom": {"n_embed": 128, "num_attention_heads": 4, "n_layer": 8, "vocab_size": 320},
    "starcoder": {
        "n_embd": 128,
        "n_inner": 512,
        "n_head": 4,
        "n_layer": 4,
        "vocab_size": 320,
        "bos_token_id": 300,
        "eos_token_id": 300,
    },
}
_TOKENS: dict[FamilyName, tuple[int, int]] = {  # at full size, small
    "llama": (32000, 320),
    "gptneox": (50277, 310),
    "bloom": (250680, 310),
    "starcoder": (49157, 305),
}
_SPECIALS: dict[FamilyName, tuple[tuple[str, ...], tuple[str, ...]]] = {  # the first ids and the last
    "gptneox": ((_END, "<|padding|>"), tuple(" " * count for count in range(24, 1, -1))),
    "bloom": (("<unk>", "<s>", "</s>", "<pad>"), ()),
    "starcoder": ((), (_END, "<fim-prefix>", "<fim-middle>", "<fim-suffix>", "<fim-pad>")),
}
_TOKENIZER_CONFIGS: dict[FamilyName, dict[str, Any]] = {
    "llama": {
        "bos_token": "",
        "eos_token": "",
        "model_max_length": 1000000000000000019884624838656,
        "tokenizer_class": "LLaMATokenizer",
        "unk_token": "",
    },
    "gptneox": {
        "add_prefix_space": False,
        "bos_token": _END,
        "eos_token": _END,
        "model_max_length": 2048,
        "tokenizer_class": "GPTNeoXTokenizer",
        "unk_token": _END,
    },
    "bloom": {
        "add_prefix_space": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "padding_side": "left",
        "tokenizer_class": "BloomTokenizerFast",
        "unk_token": "<unk>",
    },
    "starcoder": {
        "bos_token": _END,
        "eos_token": _END,
        "errors": "replace",
        "model_max_length": 2048,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": _END,
    },
}


def write_default_checkpoint(folder: Path, family: FamilyName, *, small: bool = False) -> Path:
    """Writes the look-alike into the new folder `folder` and returns it."""
    folder.mkdir(parents=True)
    config = CONFIGS[family] | (SMALL[family] if small else {})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    _write_tokenizer(folder, family, _TOKENS[family][small])
    tensors = dict(_tensors(folder, config, family))
    _write_files(folder, tensors, _files(family, tensors))
    return folder


def mend_llama(folder: Path) -> None:
    """Spells a look-alike of llama's as transformers does since its release."""
    for name, changes in (
        ("config.json", {"architectures": [_MENDED]}),
        ("tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    ):
        content = json.loads((folder / name).read_text()) | changes
        if "tokenizer_class" in content:
            content["tokenizer_class"] = "LlamaTokenizer"
        (folder / name).write_text(json.dumps(content, indent=2))


def _write_tokenizer(folder: Path, family: FamilyName, tokens: int) -> None:
    tokenizer_config = _TOKENIZER_CONFIGS[family]
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    if family == "llama":
        (folder / "special_tokens_map.json").write_text("{}")
        fillers = (f"\u2581w{i}" for i in range(tokens))
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(tokens, [*MISTRAL_WORDS, *fillers]))
        return
    named = {key: value for key, value in tokenizer_config.items() if key.endswith("_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    tokenizer = byte_level_tokenizer(tokens, *_SPECIALS[family])
    if family == "gptneox":  # runs of spaces are no special tokens
        for token in tokenizer["added_tokens"]:
            token["special"] = bool(token["content"].strip())
            token["normalized"] = not token["special"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def _tensors(folder: Path, config: dict[str, Any], family: FamilyName) -> Iterator[tuple[str, Stored]]:
    """In the order of a state dict, as far as files depend on it: a layer's tensors follow each other."""
    known = config | ({"architectures": [_MENDED]} if family == "llama" else {})
    model, layout = read_hyperparameters(folder, known, family), FAMILIES[family].layout
    shapes = {rule.source: rule.source_shape for rule in FAMILIES[family].tensors(model)}
    kind = "F32" if family == "starcoder" else "F16"
    for number, name in enumerate(sorted(shapes, key=_place)):
        full_name, shape = name if name == layout.output else layout.prefix + name, shapes[name]
        yield full_name, Stored(kind, shape, _random(full_name, shape, number, _TYPES[kind]))
    for layer in range(model.layers):
        prefix = f"{layout.prefix}layers.{layer}"
        inverse = 1 / 10000 ** (np.arange(0, model.head_width, 2) / model.head_width)
        if family == "llama":
            yield f"{prefix}.self_attn.rotary_emb.inv_freq", _buffer("F16", inverse)
        if family == "gptneox":
            mask = np.tril(np.ones((model.context, model.context)))
            yield f"{prefix}.attention.bias", _buffer("BOOL", mask[None, None])
            yield f"{prefix}.attention.masked_bias", _buffer("F16", np.array(-65504.0))
            yield f"{prefix}.attention.rotary_emb.inv_freq", _buffer("F16", inverse)


def _place(name: str) -> tuple[int, str]:
    """Embeddings, the layers by their numbers, what follows them."""
    layer = re.search(r"\.?(?:layers|h)\.(\d+)\.", name)
    if layer:
        return int(layer[1]) + 1, name
    return (0 if ("emb" in name and "embed_out" not in name) or name.startswith(("wte", "wpe")) else 1 << 20), name


def _random(name: str, shape: tuple[int, ...], number: int, kind: str) -> Callable[[], Iterable[bytes]]:
    return lambda: numbers(name, shape, number, kind)


def _buffer(kind: str, values: Any) -> Stored:
    return Stored(kind, values.shape, lambda: [values.astype(_TYPES[kind]).tobytes()])


def _files(family: FamilyName, tensors: dict[str, Stored]) -> list[list[str]]:
    """The names of each file."""
    if family == "llama":
        layers = {int(found[1]) for name in tensors if (found := re.search(r"layers\.(\d+)\.", name))}
        return [[name for name in tensors if f".layers.{layer}." in name] for layer in sorted(layers)] + [
            [name for name in tensors if ".layers." not in name]
        ]
    if family != "gptneox":
        return [list(tensors)]
    # A small one is cut as well, at the same part of it.
    limit = min(_SHARD_BYTES, sum(tensor.bytes for tensor in tensors.values()) * 0.7)
    files, size = [[]], 0  # type: list[list[str]], int
    for name in sorted(tensors, key=lambda name: _place(name.removeprefix("gpt_neox."))):
        if size + tensors[name].bytes > limit:
            files.append([])
            size = 0
        files[-1].append(name)
        size += tensors[name].bytes
    return files


def _write_files(folder: Path, tensors: dict[str, Stored], files: list[list[str]]) -> None:
    weight_map = {}
    for number, names in enumerate(files, start=1):
        file = f"pytorch_model-{number:05}-of-{len(files):05}.bin" if len(files) > 1 else "pytorch_model.bin"
        described = {name: (tensors[name].type, tensors[name].shape, b"") for name in names}
        write_archive(folder / file, state_pickle(described), (tensors[name].pieces() for name in names))
        weight_map.update(dict.fromkeys(names, file))
    if len(files) > 1:
        total = sum(tensor.bytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2))
