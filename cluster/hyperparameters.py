"""From config.json to the numbers a conversion needs, refusing every model that bigdl-llm's runtimes would compute
wrongly without a word: they read the handful of integers in the binary's head and hard-code everything else.

Hard-coded: rotary base 10000 without scaling; the tanh form of GELU (SiLU in llama), with which models made with the
erf form agree as well as others; epsilon 1e-5 in layer norms and 1e-6 in llama's. A layer norm with another epsilon is
refused: with small activations logits were off by a quarter. A llama may have up to 1e-5, as Llama 2 does: with equally
small activations its logits were off by one percent, and llm_convert takes it along.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from cluster.checkpoint import CONFIG_FILE
from cluster.errors import CheckpointError
from cluster.families import FamilyName
from cluster.ggml import file_type
from cluster.manifest import Quantization

_GELU = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")
_ROTARY_BASE = 10000.0
_LAYER_NORM_EPSILON = 1e-5
_MAX_LLAMA_EPSILON = 1e-5
NO_ENGINE = "no engine of this version runs it"

LLAMA_LAYERS = (26, 32, 40, 60, 80)
GPTNEOX_LAYERS = (16, 36, 44)
GPTNEOX_WIDTHS_OF_32_LAYERS = (2560, 4096)


class Hyperparameters(NamedTuple):
    vocabulary: int
    width: int  # of the residual stream
    feed_forward: int
    heads: int
    layers: int
    tied: bool  # the output matrix is the token embedding
    header: tuple[int, ...]  # the integers of the binary's head, in the family's order
    context: int = 0  # rows of starcoder's position table
    key_value_heads: int = 0  # of a llama checkpoint; each is repeated for the query heads that share it

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class Config:
    """config.json, read field by field; the first of several names that is present counts."""

    def __init__(self, checkpoint: Path, values: dict[str, Any]) -> None:
        self._path = checkpoint / CONFIG_FILE
        self._values = values

    def refuse(self, field: str, found: object, allowed: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {field}: found {found!r:.200}, allowed is {allowed}")

    def get(self, *names: str, default: Any = None) -> tuple[str, Any]:
        for name in names:
            if self._values.get(name) is not None:
                return name, self._values[name]
        return names[0], default

    def integer(self, *names: str, default: int | None = None) -> int:
        name, value = self.get(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            raise self.refuse(name, value, "an integer from 1 to 2147483647")
        return value

    def number(self, *names: str, default: float) -> float:
        name, value = self.get(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(name, value, "a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        _, value = self.get(name, default=default)
        if not isinstance(value, bool):
            raise self.refuse(name, value, "true or false")
        return value

    def require(self, name: str, expected: object, *, default: object, why: str) -> None:
        _, value = self.get(name, default=default)
        if value != expected:
            raise self.refuse(name, value, f"{expected!r}: {why}; {NO_ENGINE}")

    def require_choice(self, name: str, choices: tuple[str, ...], default: str) -> None:
        _, value = self.get(name, default=default)
        if value not in choices:
            raise self.refuse(name, value, f"one of {', '.join(choices)}; {NO_ENGINE}")

    def section(self, name: str) -> dict[str, Any]:
        _, value = self.get(name, default={})
        if not isinstance(value, dict):
            raise self.refuse(name, value, "an object")
        return value


def read_hyperparameters(
    checkpoint: Path, config: dict[str, Any], family: FamilyName, quantization: Quantization = "q4_0"
) -> Hyperparameters:
    """Raises CheckpointError, naming the field, for a model that the family's runtime cannot compute."""
    fields = Config(checkpoint, config)
    if config.get("quantization_config") is not None:
        raise fields.refuse("quantization_config", config["quantization_config"], "a checkpoint that is not quantized")
    return _READERS[family](fields, file_type(family, quantization))


def _llama(config: Config, kind: int) -> Hyperparameters:
    vocabulary, width = config.integer("vocab_size"), config.integer("hidden_size")
    feed_forward, layers = config.integer("intermediate_size"), config.integer("num_hidden_layers")
    heads = _heads(config, width, "num_attention_heads")
    key_value_heads = config.integer("num_key_value_heads", default=heads)
    if heads % key_value_heads:
        raise config.refuse("num_key_value_heads", key_value_heads, f"a divisor of num_attention_heads, {heads}")
    config.require("head_dim", width // heads, default=width // heads, why="hidden_size / num_attention_heads")
    for bias in ("attention_bias", "mlp_bias"):
        config.require(bias, False, default=False, why="the llama runtime adds no biases")
    config.require_choice("hidden_act", ("silu",), "silu")
    epsilon = config.number("rms_norm_eps", default=1e-6)
    if not 0 < epsilon <= _MAX_LLAMA_EPSILON:
        allowed = f"above 0, at most {_MAX_LLAMA_EPSILON}: the runtime fixes it at 1e-06; {NO_ENGINE}"
        raise config.refuse("rms_norm_eps", epsilon, allowed)
    _check_rotary(config, "rope_theta")
    if layers not in LLAMA_LAYERS:
        allowed = f"one of {', '.join(map(str, LLAMA_LAYERS))}: the llama runtime aborts on others; {NO_ENGINE}"
        raise config.refuse("num_hidden_layers", layers, allowed)
    multiple = _multiple_of(config, width, feed_forward)
    header = (vocabulary, width, multiple, heads, layers, width // heads, kind)
    tied = config.flag("tie_word_embeddings", False)
    return Hyperparameters(
        vocabulary, width, feed_forward, heads, layers, tied, header, key_value_heads=key_value_heads
    )


def _gptneox(config: Config, kind: int) -> Hyperparameters:
    vocabulary, width = config.integer("vocab_size"), config.integer("hidden_size")
    context = config.integer("max_position_embeddings", default=2048)
    layers = config.integer("num_hidden_layers")
    heads = _heads(config, width, "num_attention_heads")
    feed_forward = _four_times(config, width, "intermediate_size")
    config.require("attention_bias", True, default=True, why="the gptneox runtime adds the attention's biases")
    config.require_choice("hidden_act", _GELU, "gelu")
    _check_layer_norm(config, "layer_norm_eps")
    _check_rotary(config, "rotary_emb_base")
    _check_gptneox_layers(config, layers, width)
    rotary = _rotary_width(config, width // heads)
    parallel = config.flag("use_parallel_residual", True)
    header = (vocabulary, context, width, heads, layers, rotary, int(parallel), kind)
    tied = config.flag("tie_word_embeddings", False)
    return Hyperparameters(vocabulary, width, feed_forward, heads, layers, tied, header, context)


def _bloom(config: Config, kind: int) -> Hyperparameters:
    vocabulary, width = config.integer("vocab_size"), config.integer("hidden_size", "n_embed")
    layers = config.integer("n_layer", "num_hidden_layers")
    heads = _heads(config, width, "n_head", "num_attention_heads")
    config.require("apply_residual_connection_post_layernorm", False, default=False, why="the residual is taken before")
    _check_layer_norm(config, "layer_norm_epsilon")
    # 1: feed-forward rows come in multiples of it, so their number is 4 * width exactly.
    header = (vocabulary, width, 1, heads, layers, kind)
    tied = config.flag("tie_word_embeddings", True)
    return Hyperparameters(vocabulary, width, 4 * width, heads, layers, tied, header)


def _starcoder(config: Config, kind: int) -> Hyperparameters:
    vocabulary, width = config.integer("vocab_size"), config.integer("n_embd", "hidden_size")
    context = config.integer("n_positions", "max_position_embeddings")
    layers = config.integer("n_layer", "num_hidden_layers")
    heads = _heads(config, width, "n_head", "num_attention_heads")
    feed_forward = _four_times(config, width, "n_inner")
    config.require("multi_query", True, default=True, why="its one key and value head is repeated for every head")
    config.require("scale_attn_weights", True, default=True, why="the starcoder runtime scales attention weights")
    config.require("add_cross_attention", False, default=False, why="the starcoder runtime has a decoder only")
    config.require_choice("activation_function", _GELU, "gelu_pytorch_tanh")
    _check_layer_norm(config, "layer_norm_epsilon")
    header = (vocabulary, context, width, heads, layers, kind, vocabulary)
    tied = config.flag("tie_word_embeddings", True)
    return Hyperparameters(vocabulary, width, feed_forward, heads, layers, tied, header, context)


_READERS = {"llama": _llama, "gptneox": _gptneox, "bloom": _bloom, "starcoder": _starcoder}


def _heads(config: Config, width: int, *names: str) -> int:
    """At least two heads: with one alone, the runtimes' logits have nothing to do with transformers' (gptneox,
    starcoder), are off by some percent (llama), or the process dies of SIGSEGV (bloom); measured with 2.4.0."""
    heads = config.integer(*names)
    if heads < 2 or width % heads or (width // heads) % 2:
        allowed = f"2 or more, a divisor of the width {width} that leaves an even quotient; {NO_ENGINE}"
        raise config.refuse(config.get(*names)[0], heads, allowed)
    return heads


def _four_times(config: Config, width: int, name: str) -> int:
    config.require(name, 4 * width, default=4 * width, why="the runtime's feed-forward is four times the width")
    return 4 * width


def _check_layer_norm(config: Config, name: str) -> None:
    value = config.number(name, default=_LAYER_NORM_EPSILON)
    if value != _LAYER_NORM_EPSILON:
        raise config.refuse(name, value, f"{_LAYER_NORM_EPSILON}: the runtime fixes it; {NO_ENGINE}")


def _check_rotary(config: Config, base_name: str) -> None:
    """transformers 4 writes `rope_theta` (`rotary_emb_base`) and `rope_scaling`, transformers 5 `rope_parameters`."""
    for name in ("rope_scaling", "rope_parameters"):
        section = config.section(name)
        kind = section.get("rope_type", section.get("type", "default"))
        if kind != "default":
            raise config.refuse(name, section, f"no scaling: the runtime ignores it; {NO_ENGINE}")
        base = section.get("rope_theta", _ROTARY_BASE)
        if base != _ROTARY_BASE:
            raise config.refuse(f"{name}.rope_theta", base, f"{_ROTARY_BASE}: the runtime fixes it; {NO_ENGINE}")
    if config.number(base_name, default=_ROTARY_BASE) != _ROTARY_BASE:
        raise config.refuse(base_name, config.get(base_name)[1], f"{_ROTARY_BASE}: the runtime fixes it; {NO_ENGINE}")


def _rotary_width(config: Config, head_width: int) -> int:
    """How many of a head's numbers are rotated, rounded as llm_convert does."""
    name, share = (
        "rope_parameters.partial_rotary_factor",
        config.section("rope_parameters").get("partial_rotary_factor"),
    )
    if share is None:
        name, share = "rotary_pct", config.number("rotary_pct", "partial_rotary_factor", default=0.25)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise config.refuse(name, share, "a number above 0, at most 1")
    rotary = int(head_width * share)
    if rotary < 2 or rotary % 2:
        raise config.refuse(name, share, f"one that rotates an even number of a head's {head_width}; found {rotary}")
    return rotary


def _multiple_of(config: Config, width: int, feed_forward: int) -> int:
    """The llama head has no feed-forward width but a number of which it is the first multiple from 8/3 of the width
    on. llm_convert searches downwards from 8192, so the largest that fits is written."""
    target = 8 * width // 3
    for multiple in range(8192, 1, -1):
        if -(-target // multiple) * multiple == feed_forward:
            return multiple
    allowed = f"a number that is the first multiple of some n <= 8192 from {target} (8/3 of hidden_size) on"
    raise config.refuse("intermediate_size", feed_forward, f"{allowed}; {NO_ENGINE}")


def _check_gptneox_layers(config: Config, layers: int, width: int) -> None:
    """The library picks its buffer sizes by layer count and, at 32 layers, by width, and aborts the process on others.
    Its table is not documented; this one was found by loading heads of 1 to 96 layers at 16 widths from 64 to 12288,
    and of 32 layers at every multiple of 64 up to 12288, with libgptneox_avx512.so 2.4.0 in child processes. Neither
    vocabulary, context nor the parallel residual matter."""
    if layers in GPTNEOX_LAYERS or (layers == 32 and width in GPTNEOX_WIDTHS_OF_32_LAYERS):
        return
    widths = " or ".join(map(str, GPTNEOX_WIDTHS_OF_32_LAYERS))
    raise config.refuse(
        "num_hidden_layers",
        layers,
        f"one of {', '.join(map(str, GPTNEOX_LAYERS))}, or 32 with a hidden_size of {widths} (found {width}): the"
        f" gptneox runtime aborts on others; {NO_ENGINE}",
    )
