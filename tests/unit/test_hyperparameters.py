from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.errors import CheckpointError
from cluster.families import FAMILY_NAMES, FamilyName
from cluster.hyperparameters import Hyperparameters, read_hyperparameters

CONFIGS: dict[FamilyName, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
    },
    "gptneox": {
        "vocab_size": 50432,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "max_position_embeddings": 2048,
        "rotary_pct": 1.0,
        "use_parallel_residual": False,
        "hidden_act": "gelu",
    },
    "bloom": {"vocab_size": 250880, "n_embed": 4096, "num_attention_heads": 32, "n_layer": 30},
    "starcoder": {
        "vocab_size": 49280,
        "n_embd": 2048,
        "n_head": 16,
        "n_layer": 24,
        "n_positions": 2048,
        "n_inner": 8192,
        "multi_query": True,
        "activation_function": "gelu_fast",
    },
}


def read(family: FamilyName, **changes: Any) -> Hyperparameters:
    return read_hyperparameters(Path("folder"), CONFIGS[family] | changes, family)


def test_headers_of_the_reference_models() -> None:
    assert read("llama").header == (32000, 4096, 5504, 32, 32, 128, 2)
    assert read("gptneox").header == (50432, 2048, 4096, 32, 32, 128, 0, 2)
    assert read("bloom").header == (250880, 4096, 1, 32, 30, 2)
    assert read("starcoder").header == (49280, 2048, 2048, 16, 24, 2002, 49280)


def test_names_that_transformers_5_writes_are_read() -> None:
    changes = {"rotary_pct": None, "rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 10000.0}}
    assert read("gptneox", **changes).header[5] == 32
    assert read("gptneox", rotary_pct=None).header[5] == 32  # transformers' default is 0.25
    assert read("llama", rope_parameters={"rope_type": "default", "rope_theta": 10000.0}) == read("llama")


def test_tied_embeddings_by_default_as_in_transformers() -> None:
    assert [read(family).tied for family in FAMILY_NAMES] == [False, False, True, True]
    assert read("llama", tie_word_embeddings=True).tied


def test_key_and_value_heads_by_default_and_grouped() -> None:
    assert read("llama").key_value_heads == 32
    assert read("llama", num_key_value_heads=4).key_value_heads == 4
    assert read("llama", num_key_value_heads=4).header == read("llama").header


def test_null_counts_as_absent() -> None:
    assert read("starcoder", n_inner=None).feed_forward == 8192


# What each runtime would compute wrongly, or die of: the field, the value, a word of the message.
REFUSED: list[tuple[FamilyName, str, Any, str]] = [
    ("llama", "num_hidden_layers", 22, "one of 26, 32, 40, 60, 80: the llama runtime aborts"),
    ("llama", "num_key_value_heads", 5, "a divisor of num_attention_heads, 32"),
    ("llama", "num_key_value_heads", 64, "a divisor of num_attention_heads, 32"),
    ("llama", "head_dim", 64, "hidden_size / num_attention_heads"),
    ("llama", "attention_bias", True, "adds no biases"),
    ("llama", "mlp_bias", True, "adds no biases"),
    ("llama", "hidden_act", "gelu", "one of silu"),
    ("llama", "rms_norm_eps", 1e-4, "at most 1e-05"),
    ("llama", "rms_norm_eps", "small", "a number"),
    ("llama", "rope_theta", 500000.0, "10000.0"),
    ("llama", "rope_scaling", {"type": "linear", "factor": 2.0}, "no scaling"),
    ("llama", "rope_scaling", "linear", "an object"),
    ("llama", "rope_parameters", {"rope_type": "llama3"}, "no scaling"),
    ("llama", "rope_parameters", {"rope_theta": 500000.0}, "10000.0"),
    ("llama", "intermediate_size", 10880, "first multiple"),
    ("llama", "vocab_size", 0, "an integer from 1"),
    ("llama", "vocab_size", None, "an integer from 1"),
    ("llama", "hidden_size", "4096", "an integer from 1"),
    ("llama", "num_hidden_layers", True, "an integer from 1"),
    ("llama", "num_attention_heads", 33, "a divisor of the width 4096"),
    ("llama", "num_attention_heads", 4096, "an even quotient"),
    ("llama", "num_attention_heads", 1, "2 or more"),
    ("gptneox", "num_attention_heads", 1, "2 or more"),
    ("bloom", "num_attention_heads", 1, "2 or more"),
    ("starcoder", "n_head", 1, "2 or more"),
    ("llama", "tie_word_embeddings", "no", "true or false"),
    ("llama", "quantization_config", {"quant_method": "gptq"}, "not quantized"),
    ("gptneox", "num_hidden_layers", 24, "one of 16, 36, 44, or 32 with a hidden_size of 2560 or 4096"),
    ("gptneox", "intermediate_size", 11008, "four times the width"),
    ("gptneox", "hidden_act", "relu", "one of gelu"),
    ("gptneox", "rotary_pct", 0, "above 0, at most 1"),
    ("gptneox", "rotary_pct", 1.5, "above 0, at most 1"),
    ("gptneox", "rotary_pct", 0.01, "an even number"),
    ("gptneox", "rotary_emb_base", 1000000, "10000.0"),
    ("gptneox", "attention_bias", False, "the attention's biases"),
    ("gptneox", "layer_norm_eps", 1e-6, "1e-05: the runtime fixes it"),
    ("bloom", "layer_norm_epsilon", 1e-6, "1e-05: the runtime fixes it"),
    ("starcoder", "layer_norm_epsilon", 1e-4, "1e-05: the runtime fixes it"),
    ("bloom", "apply_residual_connection_post_layernorm", True, "the residual"),
    ("bloom", "n_layer", -1, "an integer from 1"),
    ("starcoder", "multi_query", False, "one key and value head"),
    ("starcoder", "activation_function", "relu", "one of gelu"),
    ("starcoder", "scale_attn_weights", False, "scales attention"),
    ("starcoder", "n_inner", 4096, "four times the width"),
    ("starcoder", "add_cross_attention", True, "decoder"),
]


@pytest.mark.parametrize(("family", "field", "value", "message"), REFUSED)
def test_what_the_runtime_cannot_compute_is_refused_by_field(
    family: FamilyName, field: str, value: Any, message: str
) -> None:
    with pytest.raises(CheckpointError) as refusal:
        read(family, **{field: value})
    assert str(refusal.value).startswith(f"folder/config.json: {field}")
    assert "found" in str(refusal.value)
    assert message in str(refusal.value)


@pytest.mark.parametrize("layers", [26, 32, 40, 60, 80])
def test_llama_layer_counts_that_the_library_knows(layers: int) -> None:
    assert read("llama", num_hidden_layers=layers).layers == layers


@pytest.mark.parametrize(
    ("layers", "width"), [(16, 128), (16, 8192), (36, 5120), (44, 6144), (32, 2560), (32, 4096), (44, 64)]
)
def test_gptneox_layer_counts_that_the_library_knows(layers: int, width: int) -> None:
    assert read("gptneox", num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width).layers == layers


@pytest.mark.parametrize(("layers", "width"), [(32, 2048), (32, 5120), (24, 4096), (15, 128), (17, 128)])
def test_gptneox_layer_counts_that_abort_the_library(layers: int, width: int) -> None:
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        read("gptneox", num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width)
