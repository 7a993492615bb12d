from __future__ import annotations

from typing import Any

import pytest
from transformers import BloomConfig, GPTBigCodeConfig

from cluster.errors import CheckpointError
from cluster.families import FAMILY_NAMES, FamilyName
from cluster.families.architecture import Activation
from cluster.families.rotary import Rotary
from tests.unit.model_configs import read


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


# transformers' own answer for a configuration that has both names, for instance BloomConfig(n_layer=3,
# num_hidden_layers=4).n_layer == 4.
ALIASES: list[tuple[FamilyName, str, str, str]] = [
    ("bloom", "n_embed", "hidden_size", "width"),
    ("bloom", "num_hidden_layers", "n_layer", "layers"),
    ("bloom", "num_attention_heads", "n_head", "heads"),
    ("starcoder", "hidden_size", "n_embd", "width"),
    ("starcoder", "max_position_embeddings", "n_positions", "context"),
    ("starcoder", "num_hidden_layers", "n_layer", "layers"),
    ("starcoder", "num_attention_heads", "n_head", "heads"),
]


@pytest.mark.parametrize(("family", "wins", "loses", "attribute"), ALIASES)
def test_a_field_with_two_names_is_read_as_transformers_does(
    family: FamilyName, wins: str, loses: str, attribute: str
) -> None:
    assert getattr(read(family, **{wins: 64, loses: None}), attribute) == 64
    assert getattr(read(family, **{wins: None, loses: 64}), attribute) == 64
    assert getattr(read(family, **{wins: 64, loses: 128}), attribute) == 64


def test_transformers_gives_a_field_with_two_names_the_same_value() -> None:
    for family, wins, loses, _ in ALIASES:
        config = {"bloom": BloomConfig, "starcoder": GPTBigCodeConfig}[family](**{wins: 64, loses: 128})
        name = loses if wins in config.attribute_map else "hidden_size"
        assert getattr(config, name) == 64, (family, wins)


@pytest.mark.parametrize(
    ("family", "field", "names", "activation"),
    [
        ("llama", "hidden_act", ["silu", "swish"], "silu"),
        ("gptneox", "hidden_act", ["gelu", "gelu_python"], "gelu"),
        ("gptneox", "hidden_act", ["gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh"], "gelu_tanh"),
        ("starcoder", "activation_function", ["gelu", "gelu_python"], "gelu"),
        ("starcoder", "activation_function", ["gelu_new", "gelu_fast", "gelu_pytorch_tanh"], "gelu_tanh"),
    ],
)
def test_activations_by_each_of_their_names(
    family: FamilyName, field: str, names: list[str], activation: Activation
) -> None:
    assert {read(family, **{field: name}).activation for name in names} == {activation}


def test_tied_embeddings_by_default_as_in_transformers() -> None:
    assert [read(family).tied for family in FAMILY_NAMES] == [False, False, True, True]
    assert read("llama", tie_word_embeddings=True).tied


def test_key_and_value_heads_by_default_and_grouped() -> None:
    assert [read(family).key_value_heads for family in FAMILY_NAMES] == [32, 32, 32, 1]
    assert read("llama", num_key_value_heads=4).key_value_heads == 4
    assert read("llama", num_key_value_heads=4).header == read("llama").header


def test_what_the_configurations_say_beyond_the_head() -> None:
    assert read("llama").epsilon == 1e-6
    assert read("llama", rms_norm_eps=1e-5).epsilon == 1e-5
    assert [read(family).activation for family in FAMILY_NAMES] == ["silu", "gelu", "gelu_tanh", "gelu_tanh"]
    assert read("starcoder", activation_function="gelu").activation == "gelu"
    assert read("gptneox", hidden_act="gelu_new").activation == "gelu_tanh"
    assert [read(family).rotary for family in FAMILY_NAMES] == [Rotary(128, 1e4), Rotary(128, 1e4), None, None]
    assert read("gptneox", rotary_pct=0.25).rotary == Rotary(32, 1e4)
    assert [read("gptneox", use_parallel_residual=flag).parallel_residual for flag in (True, False)] == [True, False]
    assert read("gptneox", intermediate_size=11008).feed_forward == 11008
    assert read("starcoder", n_inner=4096).feed_forward == 4096


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_SCALING = tuple((name, float(number)) for name, number in list(LLAMA3.items())[1:])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_theta": 500000}, Rotary(128, 5e5)),
        ({"rope_theta": 500000, "rope_scaling": None}, Rotary(128, 5e5)),
        ({"rope_theta": 500000, "rope_scaling": LLAMA3}, Rotary(128, 5e5, LLAMA3_SCALING, "llama3")),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, Rotary(128, 5e5, LLAMA3_SCALING, "llama3")),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, Rotary(128, 1e4, (("factor", 2.0),), "linear")),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 2e4}, Rotary(128, 2e4)),
        ({"rope_parameters": {"rope_theta": 3e4}, "rope_theta": 2e4}, Rotary(128, 3e4)),
        # As transformers 5 has it where both are there.
        ({"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_theta": 3e4}}, Rotary(128, 1e4)),
        (
            {
                "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"},
                "max_position_embeddings": 4096,
            },
            Rotary(128, 1e4, (*LLAMA3_SCALING[:3], ("original_max_position_embeddings", 4096.0)), "llama3"),
        ),
    ],
)
def test_rotary_embeddings_in_the_words_of_transformers_4_and_5(changes: dict[str, Any], expected: Rotary) -> None:
    assert read("llama", **changes).rotary == expected


def test_gptneox_rotates_a_part_of_a_head_by_another_base() -> None:
    names = {"rotary_pct": None, "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 5e5}}
    assert read("gptneox", **names).rotary == Rotary(64, 5e5)
    assert read("gptneox", rotary_emb_base=25000).rotary == Rotary(128, 25000.0)
    scaled = read("gptneox", rope_scaling={"type": "linear", "factor": 4.0})
    assert scaled.rotary == Rotary(128, 1e4, (("factor", 4.0),), "linear")


@pytest.mark.parametrize(
    ("section", "field", "message"),
    [
        ({"type": "dynamic", "factor": 2.0}, "type", "'dynamic', allowed is one of default, linear, llama3; no engine"),
        ({"rope_type": "yarn"}, "rope_type", "'yarn', allowed is one of default, linear, llama3; no engine"),
        ({"rope_type": ["linear"]}, "rope_type", "['linear'], allowed is one of default"),
        ({"rope_type": "linear"}, "factor", "None, allowed is a number above 0"),
        ({"rope_type": "linear", "factor": 0}, "factor", "0, allowed is a number above 0"),
        ({"rope_type": "default", "rope_theta": -1}, "rope_theta", "-1, allowed is a number above 0"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor", "1.0, allowed is one above low_freq_factor, 1.0"),
        ({k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}, "low_freq_factor", "None, allowed is a number"),
    ],
)
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_rotary_embeddings_that_no_engine_has_are_refused(
    name: str, section: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(CheckpointError) as refusal:
        read("llama", **{name: section})
    assert str(refusal.value).startswith(f"folder/config.json: {name}.{field}: found {message}")


def test_biases_of_a_llama_and_of_qwen2() -> None:
    def biases(**changes: Any) -> tuple[bool, bool]:
        model = read("llama", **changes)
        return model.attention_bias, model.output_bias

    assert biases() == (False, False)
    assert biases(attention_bias=True) == (True, True)
    assert biases(architectures=["Qwen2ForCausalLM"]) == (True, False)
    assert biases(architectures=["MistralForCausalLM"], attention_bias=True) == (False, False)  # it has none


@pytest.mark.parametrize(
    ("changes", "bias", "window"),
    [
        ({"architectures": ["LLaMAForCausalLM"]}, False, None),
        ({"architectures": ["Qwen2Model"]}, True, None),
        ({"architectures": ["MistralModel"]}, False, 4096),
        # transformers goes by the model type.
        ({"architectures": ["MistralForCausalLM"], "model_type": "llama"}, False, None),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "mistral"}, False, 4096),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "qwen2"}, True, None),
    ],
)
def test_the_variant_of_a_llama_is_told_by_its_model_type(
    changes: dict[str, Any], bias: bool, window: int | None
) -> None:
    model = read("llama", **changes)
    assert (model.attention_bias, model.sliding_window) == (bias, window)


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"sliding_window": 4096}, None),  # a llama has none
        ({"model_type": "mistral", "sliding_window": 1024}, 1024),
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "qwen2", "sliding_window": 1024}, None),
        ({"model_type": "qwen2", "sliding_window": 1024, "use_sliding_window": True, "max_window_layers": 0}, 1024),
        ({"model_type": "qwen2", "sliding_window": 1024, "use_sliding_window": True, "max_window_layers": 32}, None),
        ({"model_type": "qwen2", "sliding_window": None, "use_sliding_window": True}, None),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["sliding_attention"] * 32}, 4096),
        ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"] * 32}, None),
    ],
)
def test_sliding_windows_as_transformers_reads_them(changes: dict[str, Any], window: int | None) -> None:
    assert read("llama", **changes).sliding_window == window


def test_a_window_of_some_layers_only_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"max_window_layers: found 28, allowed is the same attention in all 32"):
        read("llama", model_type="qwen2", use_sliding_window=True)
    types = ["full_attention", *["sliding_attention"] * 31]
    with pytest.raises(CheckpointError, match=r"layer_types: found \['full_attention', .* no engine of this version"):
        read("llama", model_type="qwen2", use_sliding_window=True, layer_types=types)


def test_null_counts_as_absent() -> None:
    assert read("starcoder", n_inner=None).feed_forward == 8192


# What no engine computes as transformers does: the field, the value, a word of the message.
REFUSED: list[tuple[FamilyName, str, Any, str]] = [
    ("llama", "num_key_value_heads", 5, "a divisor of num_attention_heads, 32"),
    ("llama", "num_key_value_heads", 64, "a divisor of num_attention_heads, 32"),
    ("llama", "head_dim", 64, "hidden_size / num_attention_heads; no engine of this version runs it"),
    ("llama", "mlp_bias", True, "the feed-forward has no biases; no engine of this version runs it"),
    ("llama", "attention_bias", "yes", "true or false"),
    ("llama", "hidden_act", "gelu", "one of silu, swish; no engine of this version runs it"),
    ("llama", "rms_norm_eps", "small", "a number above 0"),
    ("llama", "rms_norm_eps", 0, "a number above 0"),
    ("llama", "rms_norm_eps", float("nan"), "a number above 0"),
    ("llama", "rope_theta", 10**400, "a number above 0"),
    ("llama", "rope_theta", True, "a number above 0"),
    ("llama", "rope_scaling", "linear", "an object"),
    ("llama", "vocab_size", 0, "an integer from 1"),
    ("llama", "vocab_size", None, "an integer from 1"),
    ("llama", "hidden_size", "4096", "an integer from 1"),
    ("llama", "num_hidden_layers", True, "an integer from 1"),
    ("llama", "num_attention_heads", 33, "a divisor of the width 4096"),
    ("llama", "num_attention_heads", 4096, "an even quotient"),
    ("llama", "tie_word_embeddings", "no", "true or false"),
    ("llama", "quantization_config", {"quant_method": "gptq"}, "not quantized"),
    (
        "gptneox",
        "hidden_act",
        "relu",
        "one of gelu, gelu_python, gelu_new, gelu_fast, gelu_accurate, gelu_pytorch_tanh",
    ),
    ("gptneox", "rotary_pct", 0, "above 0, at most 1"),
    ("gptneox", "rotary_pct", 1.5, "above 0, at most 1"),
    ("gptneox", "rotary_pct", 0.01, "an even number"),
    ("gptneox", "attention_bias", False, "the attention's biases"),
    ("bloom", "apply_residual_connection_post_layernorm", True, "the residual"),
    ("bloom", "n_layer", -1, "an integer from 1"),
    ("bloom", "layer_norm_epsilon", -1e-5, "a number above 0"),
    ("starcoder", "multi_query", False, "one key and value head"),
    ("starcoder", "activation_function", "relu", "one of gelu"),
    ("starcoder", "scale_attn_weights", False, "attention weights are scaled"),
    ("starcoder", "n_inner", 0, "an integer from 1"),
    ("starcoder", "add_cross_attention", True, "decoder"),
]


@pytest.mark.parametrize(("family", "field", "value", "message"), REFUSED)
def test_what_no_engine_computes_is_refused_by_field(family: FamilyName, field: str, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        read(family, **{field: value})
    assert str(refusal.value).startswith(f"folder/config.json: {field}: found")
    assert message in str(refusal.value)
