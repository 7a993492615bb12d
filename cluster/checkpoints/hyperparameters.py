"""From config.json to the numbers that a conversion and an engine need, and which engines can run such a model.

What neither engine computes as transformers does is refused. What bigdl-llm's runtimes would compute wrongly without a
word, or abort on, is an obstacle to that engine alone: they read the handful of integers in the binary's head and
hard-code everything else. Engine openvino builds its graph from these numbers and has none of these limits.

Of a field with two names, the one that transformers lets win is read first: where a configuration has both, the name of
its `attribute_map` and bloom's n_embed overwrite the other.

Hard-coded by the runtimes: rotary base 10000 without scaling; the tanh form of GELU (SiLU in llama), with which models
made with the erf form agree as well as others; epsilon 1e-5 in layer norms and 1e-6 in llama's. A layer norm with
another epsilon is an obstacle: with small activations logits were off by a quarter. A llama may have up to 1e-5, as
Llama 2 does: with equally small activations its logits were off by one percent, and llm_convert takes it along.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

from cluster.artifacts.ggml import file_type
from cluster.artifacts.manifest import Manifest, Quantization
from cluster.checkpoints.config_fields import NO_ENGINE, Config
from cluster.checkpoints.folder import read_config
from cluster.checkpoints.rotary import Rotary, read_rotary, rotary_width
from cluster.errors import CheckpointError
from cluster.families import ENGINE_NAMES, EngineName, FamilyName

Activation = Literal["silu", "gelu", "gelu_tanh"]

# By transformers' names (`transformers.activations`): the form with erf, and the same function with tanh in its place.
_GELU: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}
_SILU = ("silu", "swish")
_LAYER_NORM_EPSILON = 1e-5
_MAX_LLAMA_EPSILON = 1e-5

LLAMA_LAYERS = (26, 32, 40, 60, 80)
GPTNEOX_LAYERS = (16, 36, 44)
GPTNEOX_WIDTHS_OF_32_LAYERS = (2560, 4096)


class Hyperparameters(NamedTuple):
    vocabulary: int
    width: int  # of the residual stream
    feed_forward: int
    heads: int
    key_value_heads: int  # of the checkpoint; the binary has each repeated for the query heads that share it
    layers: int
    tied: bool  # by config.json, the output matrix is the token embedding; what is stored may say otherwise
    header: tuple[int, ...]  # the integers of the binary's head, in the family's order
    epsilon: float  # of the RMS norms (llama) or layer norms
    activation: Activation
    context: int = 0  # gptneox's, and the rows of starcoder's position table
    rotary: Rotary | None = None
    parallel_residual: bool = False  # gptneox: attention and feed-forward have the same input
    attention_bias: bool = False  # llama: q, k and v have biases
    output_bias: bool = False  # llama: and so has what follows the attention
    sliding_window: int | None = None  # a token attends to so many, itself among them; None: to all before it
    obstacles: tuple[tuple[EngineName, str], ...] = ()  # why an engine cannot run it, one reason each

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def engines(self) -> tuple[EngineName, ...]:
        return tuple(name for name in ENGINE_NAMES if name not in dict(self.obstacles))


def require_engine(engine: EngineName | None, obstacles: tuple[tuple[EngineName, str], ...]) -> None:
    """Raises CheckpointError, with the obstacle, where `engine` has one; None: any engine will do."""
    for hindered, obstacle in obstacles:
        if hindered == engine:
            raise CheckpointError(obstacle)


def read_hyperparameters(
    checkpoint: Path, config: dict[str, Any], family: FamilyName, quantization: Quantization = "q4_0"
) -> Hyperparameters:
    """Of a checkpoint or an artifact, whose folder is only named in messages. Raises CheckpointError, naming the field,
    for a model that no engine can compute."""
    fields = Config(checkpoint, config)
    if config.get("quantization_config") is not None:
        raise fields.refuse("quantization_config", config["quantization_config"], "a checkpoint that is not quantized")
    return _READERS[family](fields, file_type(family, quantization))._replace(obstacles=fields.obstacles)


def _llama(config: Config, kind: int) -> Hyperparameters:
    vocabulary, width = config.integer("vocab_size"), config.integer("hidden_size")
    feed_forward, layers = config.integer("intermediate_size"), config.integer("num_hidden_layers")
    variant = _llama_variant(config)
    heads = _heads(config, width, "num_attention_heads")
    key_value_heads = config.integer("num_key_value_heads", default=heads)
    if heads % key_value_heads:
        raise config.refuse("num_key_value_heads", key_value_heads, f"a divisor of num_attention_heads, {heads}")
    config.require("head_dim", width // heads, default=width // heads, why="hidden_size / num_attention_heads")
    config.require("mlp_bias", False, default=False, why="the feed-forward has no biases")
    config.choice("hidden_act", choices=_SILU, default="silu")
    output_bias = variant == "llama" and config.flag("attention_bias", False)
    if output_bias:
        config.hinder_bigdl("attention_bias", True, "False: the llama runtime adds no biases")
    epsilon = config.positive("rms_norm_eps", default=1e-6)
    if epsilon > _MAX_LLAMA_EPSILON:
        config.hinder_bigdl("rms_norm_eps", epsilon, f"at most {_MAX_LLAMA_EPSILON}: the runtime fixes it at 1e-06")
    rotary = read_rotary(config, width // heads, "rope_theta")
    if layers not in LLAMA_LAYERS:
        allowed = f"one of {', '.join(map(str, LLAMA_LAYERS))}: the llama runtime aborts on others"
        config.hinder_bigdl("num_hidden_layers", layers, allowed)
    multiple = _multiple_of(config, width, feed_forward)
    return Hyperparameters(
        vocabulary=vocabulary,
        width=width,
        feed_forward=feed_forward,
        heads=heads,
        key_value_heads=key_value_heads,
        layers=layers,
        tied=config.flag("tie_word_embeddings", False),
        header=(vocabulary, width, multiple, heads, layers, width // heads, kind),
        epsilon=epsilon,
        activation="silu",
        rotary=rotary,
        attention_bias=output_bias or variant == "qwen2",
        output_bias=output_bias,
        sliding_window=_sliding_window(config, variant, layers),
    )


def _llama_variant(config: Config) -> str:
    """llama, mistral or qwen2, as transformers finds it: by "model_type", whatever "architectures" says beside it."""
    name, found = config.get("model_type", "architectures")
    described = str(found).lower()
    for variant, difference in (("mistral", "no sliding window"), ("qwen2", "no biases")):
        if variant in described:
            config.hinder_bigdl(name, found, f"LlamaForCausalLM: the llama runtime knows {difference}")
            return variant
    return "llama"


def _sliding_window(config: Config, variant: str, layers: int) -> int | None:
    """Mistral's, 4096 where config.json leaves it out; Qwen2's if switched on. Of all layers or none."""
    if variant == "llama" or (variant == "qwen2" and not config.flag("use_sliding_window", False)):
        return None
    if config.is_null("sliding_window"):
        return None
    window = config.integer("sliding_window", default=4096)
    if variant == "mistral":
        return window
    name, types = config.get("layer_types")
    if isinstance(types, list):
        sliding = types.count("sliding_attention")
    else:
        name, types = "max_window_layers", config.integer("max_window_layers", default=28, least=0)
        sliding = max(0, layers - types)
    if 0 < sliding < layers:
        raise config.refuse(name, types, f"the same attention in all {layers} layers; {NO_ENGINE}")
    return window if sliding else None


def _gptneox(config: Config, kind: int) -> Hyperparameters:
    vocabulary, width = config.integer("vocab_size"), config.integer("hidden_size")
    context = config.integer("max_position_embeddings", default=2048)
    layers = config.integer("num_hidden_layers")
    heads = _heads(config, width, "num_attention_heads")
    config.require("attention_bias", True, default=True, why="the attention's biases are added")
    rotary = read_rotary(config, rotary_width(config, width // heads), "rotary_emb_base")
    _check_gptneox_layers(config, layers, width)
    parallel = config.flag("use_parallel_residual", True)
    return Hyperparameters(
        vocabulary=vocabulary,
        width=width,
        feed_forward=_feed_forward(config, width, "intermediate_size"),
        heads=heads,
        key_value_heads=heads,
        layers=layers,
        tied=config.flag("tie_word_embeddings", False),
        header=(vocabulary, context, width, heads, layers, rotary.width, int(parallel), kind),
        epsilon=_layer_norm_epsilon(config, "layer_norm_eps"),
        activation=_GELU[config.choice("hidden_act", choices=tuple(_GELU), default="gelu")],
        context=context,
        rotary=rotary,
        parallel_residual=parallel,
    )


def _bloom(config: Config, kind: int) -> Hyperparameters:
    vocabulary, width = config.integer("vocab_size"), config.integer("n_embed", "hidden_size")
    layers = config.integer("num_hidden_layers", "n_layer")
    heads = _heads(config, width, "num_attention_heads", "n_head")
    config.require("apply_residual_connection_post_layernorm", False, default=False, why="the residual is taken before")
    return Hyperparameters(
        vocabulary=vocabulary,
        width=width,
        feed_forward=4 * width,
        heads=heads,
        key_value_heads=heads,
        layers=layers,
        tied=config.flag("tie_word_embeddings", True),
        # 1: feed-forward rows come in multiples of it, so their number is 4 * width exactly.
        header=(vocabulary, width, 1, heads, layers, kind),
        epsilon=_layer_norm_epsilon(config, "layer_norm_epsilon"),
        activation="gelu_tanh",
    )


def _starcoder(config: Config, kind: int) -> Hyperparameters:
    vocabulary, width = config.integer("vocab_size"), config.integer("hidden_size", "n_embd")
    context = config.integer("max_position_embeddings", "n_positions")
    layers = config.integer("num_hidden_layers", "n_layer")
    heads = _heads(config, width, "num_attention_heads", "n_head")
    config.require("multi_query", True, default=True, why="its one key and value head is repeated for every head")
    config.require("scale_attn_weights", True, default=True, why="attention weights are scaled")
    config.require("add_cross_attention", False, default=False, why="there is a decoder only")
    return Hyperparameters(
        vocabulary=vocabulary,
        width=width,
        feed_forward=_feed_forward(config, width, "n_inner"),
        heads=heads,
        key_value_heads=1,
        layers=layers,
        tied=config.flag("tie_word_embeddings", True),
        header=(vocabulary, context, width, heads, layers, kind, vocabulary),
        epsilon=_layer_norm_epsilon(config, "layer_norm_epsilon"),
        activation=_GELU[config.choice("activation_function", choices=tuple(_GELU), default="gelu_pytorch_tanh")],
        context=context,
    )


def artifact_hyperparameters(folder: Path, manifest: Manifest) -> Hyperparameters:
    """Of the artifact in `folder`, which has its checkpoint's config.json. Raises as read_hyperparameters does."""
    return read_hyperparameters(folder, read_config(folder), manifest.family, manifest.quantization)


_READERS = {"llama": _llama, "gptneox": _gptneox, "bloom": _bloom, "starcoder": _starcoder}


def _heads(config: Config, width: int, *names: str) -> int:
    """One head alone is an obstacle: with it, the runtimes' logits have nothing to do with transformers' (gptneox,
    starcoder), are off by some percent (llama), or the process dies of SIGSEGV (bloom); measured with 2.4.0."""
    heads, name = config.integer(*names), config.get(*names)[0]
    if width % heads or (width // heads) % 2:
        raise config.refuse(name, heads, f"a divisor of the width {width} that leaves an even quotient; {NO_ENGINE}")
    if heads == 1:
        config.hinder_bigdl(name, heads, "2 or more: the runtime computes other things with one")
    return heads


def _feed_forward(config: Config, width: int, name: str) -> int:
    found = config.integer(name, default=4 * width)
    if found != 4 * width:
        config.hinder_bigdl(name, found, f"{4 * width}: the runtime's feed-forward is four times the width")
    return found


def _layer_norm_epsilon(config: Config, name: str) -> float:
    epsilon = config.positive(name, default=_LAYER_NORM_EPSILON)
    if epsilon != _LAYER_NORM_EPSILON:
        config.hinder_bigdl(name, epsilon, f"{_LAYER_NORM_EPSILON}: the runtime fixes it")
    return epsilon


def _multiple_of(config: Config, width: int, feed_forward: int) -> int:
    """The llama head has no feed-forward width but a number of which it is the first multiple from 8/3 of the width
    on. llm_convert searches downwards from 8192, so the largest that fits is written; 0 where none does, in a file that
    the runtime must not see."""
    target = 8 * width // 3
    for multiple in range(8192, 1, -1):
        if -(-target // multiple) * multiple == feed_forward:
            return multiple
    allowed = f"a number that is the first multiple of some n <= 8192 from {target} (8/3 of hidden_size) on"
    config.hinder_bigdl("intermediate_size", feed_forward, allowed)
    return 0


def _check_gptneox_layers(config: Config, layers: int, width: int) -> None:
    """The library picks its buffer sizes by layer count and, at 32 layers, by width, and aborts the process on others.
    Its table is not documented; this one was found by loading heads of 1 to 96 layers at 16 widths from 64 to 12288,
    and of 32 layers at every multiple of 64 up to 12288, with libgptneox_avx512.so 2.4.0 in child processes. Neither
    vocabulary, context nor the parallel residual matter."""
    if layers in GPTNEOX_LAYERS or (layers == 32 and width in GPTNEOX_WIDTHS_OF_32_LAYERS):
        return
    widths = " or ".join(map(str, GPTNEOX_WIDTHS_OF_32_LAYERS))
    config.hinder_bigdl(
        "num_hidden_layers",
        layers,
        f"one of {', '.join(map(str, GPTNEOX_LAYERS))}, or 32 with a hidden_size of {widths} (found {width}): the"
        " gptneox runtime aborts on others",
    )
