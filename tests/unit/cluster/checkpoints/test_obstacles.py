"""Which engines can run a model, and why another cannot: the obstacles of `cluster.checkpoints.hyperparameters`."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.checkpoints.hyperparameters import require_engine
from cluster.errors import CheckpointError
from cluster.families import FAMILY_NAMES, FamilyName
from tests.unit.model_configs import read

# What bigdl-llm's runtimes compute wrongly or die of, and engine openvino runs: the field, the value, what is allowed.
HINDERED: list[tuple[FamilyName, str, Any, str]] = [
    ("llama", "num_hidden_layers", 22, "one of 26, 32, 40, 60, 80: the llama runtime aborts on others"),
    ("llama", "num_attention_heads", 1, "2 or more: the runtime computes other things with one"),
    ("llama", "attention_bias", True, "False: the llama runtime adds no biases"),
    ("llama", "rms_norm_eps", 1e-4, "at most 1e-05: the runtime fixes it at 1e-06"),
    ("llama", "rope_theta", 500000.0, "10000.0: the runtime fixes it"),
    ("llama", "rope_scaling", {"type": "linear", "factor": 2.0}, "no scaling: the runtime ignores it"),
    (
        "llama",
        "intermediate_size",
        10880,
        "a number that is the first multiple of some n <= 8192 from 10922 (8/3 of hidden_size) on",
    ),
    ("llama", "architectures", ["MistralForCausalLM"], "LlamaForCausalLM: the llama runtime knows no sliding window"),
    ("llama", "model_type", "qwen2", "LlamaForCausalLM: the llama runtime knows no biases"),
    ("gptneox", "num_attention_heads", 1, "2 or more: the runtime computes other things with one"),
    ("bloom", "num_attention_heads", 1, "2 or more: the runtime computes other things with one"),
    ("starcoder", "n_head", 1, "2 or more: the runtime computes other things with one"),
    (
        "gptneox",
        "num_hidden_layers",
        24,
        "one of 16, 36, 44, or 32 with a hidden_size of 2560 or 4096 (found 4096): the gptneox runtime aborts on"
        " others",
    ),
    ("gptneox", "intermediate_size", 11008, "16384: the runtime's feed-forward is four times the width"),
    ("gptneox", "rotary_emb_base", 1000000, "10000.0: the runtime fixes it"),
    ("gptneox", "layer_norm_eps", 1e-6, "1e-05: the runtime fixes it"),
    ("bloom", "layer_norm_epsilon", 1e-6, "1e-05: the runtime fixes it"),
    ("starcoder", "layer_norm_epsilon", 1e-4, "1e-05: the runtime fixes it"),
    ("starcoder", "n_inner", 4096, "8192: the runtime's feed-forward is four times the width"),
]


@pytest.mark.parametrize(("family", "field", "value", "allowed"), HINDERED)
def test_what_bigdls_runtime_cannot_compute_is_an_obstacle_to_it_alone(
    family: FamilyName, field: str, value: Any, allowed: str
) -> None:
    model = read(family, **{field: value})
    found = float(value) if field == "rotary_emb_base" else value
    text = f"folder/config.json: {field}: found {found!r}, allowed is {allowed}; engine openvino runs it"
    assert model.obstacles == (("bigdl", text),)
    assert model.engines == ("openvino",)


def test_without_obstacles_every_engine_runs_a_model() -> None:
    for family in FAMILY_NAMES:
        assert (read(family).obstacles, read(family).engines) == ((), ("bigdl", "openvino"))


def test_the_first_obstacle_is_kept() -> None:
    ((_, text),) = read("llama", num_hidden_layers=3, rope_theta=5e5, intermediate_size=10880).obstacles
    assert "rope_theta" in text


def test_an_engine_with_an_obstacle_is_refused_with_its_text() -> None:
    obstacles = read("bloom", layer_norm_epsilon=1e-6).obstacles
    require_engine("openvino", obstacles)
    require_engine(None, obstacles)
    with pytest.raises(CheckpointError, match=r"layer_norm_epsilon: found 1e-06.*engine openvino runs it"):
        require_engine("bigdl", obstacles)


def test_a_llama_feed_forward_that_is_no_first_multiple_leaves_the_head_without_one() -> None:
    assert read("llama", intermediate_size=10880).header == (32000, 4096, 0, 32, 32, 128, 2)
    assert read("llama", intermediate_size=14336).header[2] == 7168


@pytest.mark.parametrize("layers", [26, 32, 40, 60, 80])
def test_llama_layer_counts_that_the_library_knows(layers: int) -> None:
    assert "bigdl" in read("llama", num_hidden_layers=layers).engines


@pytest.mark.parametrize(
    ("layers", "width"), [(16, 128), (16, 8192), (36, 5120), (44, 6144), (32, 2560), (32, 4096), (44, 64)]
)
def test_gptneox_layer_counts_that_the_library_knows(layers: int, width: int) -> None:
    model = read("gptneox", num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width)
    assert "bigdl" in model.engines


@pytest.mark.parametrize(("layers", "width"), [(32, 2048), (32, 5120), (24, 4096), (15, 128), (17, 128)])
def test_gptneox_layer_counts_that_abort_the_library(layers: int, width: int) -> None:
    model = read("gptneox", num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width)
    assert "num_hidden_layers" in dict(model.obstacles)["bigdl"]
