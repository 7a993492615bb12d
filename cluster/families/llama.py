"""Family llama: Llama, Mistral and Qwen2."""

from __future__ import annotations

import re
from collections.abc import Iterator

from cluster.families.architecture import Hyperparameters, read_heads
from cluster.families.config_fields import NO_ENGINE, Config
from cluster.families.family import ALIGNED, Container, Family, NativeLibrary, Transcript
from cluster.families.rotary import read_rotary
from cluster.families.tensors import (
    ROTARY_BUFFERS,
    GraphWeights,
    Layout,
    Part,
    PartRows,
    RowOrder,
    TensorRule,
    graph_pair,
)

# Layer counts that the library knows; it aborts on others.
_LAYERS = (26, 32, 40, 60, 80)
# The library fixes 1e-6. Llama 2 has 1e-5: with small activations its logits were off by one percent, and llm_convert
# takes it along.
_MAX_EPSILON = 1e-5
_SILU = ("silu", "swish")


def _hyperparameters(config: Config, file_type: int) -> Hyperparameters:
    vocabulary, width = config.integer("vocab_size"), config.integer("hidden_size")
    feed_forward, layers = config.integer("intermediate_size"), config.integer("num_hidden_layers")
    variant = _variant(config)
    heads = read_heads(config, width, "num_attention_heads")
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
    if epsilon > _MAX_EPSILON:
        config.hinder_bigdl("rms_norm_eps", epsilon, f"at most {_MAX_EPSILON}: the runtime fixes it at 1e-06")
    rotary = read_rotary(config, width // heads, "rope_theta")
    if layers not in _LAYERS:
        allowed = f"one of {', '.join(map(str, _LAYERS))}: the llama runtime aborts on others"
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
        header=(vocabulary, width, multiple, heads, layers, width // heads, file_type),
        epsilon=epsilon,
        activation="silu",
        rotary=rotary,
        attention_bias=output_bias or variant == "qwen2",
        output_bias=output_bias,
        sliding_window=_sliding_window(config, variant, layers),
    )


def _variant(config: Config) -> str:
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


def _tensors(model: Hyperparameters) -> Iterator[TensorRule]:
    square, wide = (model.width, model.width), (model.feed_forward, model.width)
    embedding = (model.vocabulary, model.width)
    grouped = (model.key_value_heads * model.head_width, model.width)

    def matrix(name: str, source: str, shape: tuple[int, int], rows: RowOrder = "as_is") -> TensorRule:
        return TensorRule(f"{name}.weight", f"{source}.weight", shape, "quantized", rows)

    def norm(name: str, source: str) -> TensorRule:
        return TensorRule(f"{name}.weight", f"{source}.weight", (model.width,), "f32", rounded=False)

    def projection(name: str, source: str, shape: tuple[int, int], rows: RowOrder, bias: bool) -> Iterator[TensorRule]:
        yield matrix(name, source, shape, rows)
        if bias:
            yield TensorRule(f"{name}.bias", f"{source}.bias", shape[:1], "f32", rows, rounded=False)

    repeated: RowOrder = "as_is" if grouped == square else "repeat_heads"
    yield matrix("tok_embeddings", "embed_tokens", embedding)
    yield norm("norm", "norm")
    yield matrix("output", "lm_head", embedding)
    for i in range(model.layers):
        layer, ours, theirs = f"layers.{i}", f"layers.{i}.attention", f"layers.{i}.self_attn"
        yield from projection(f"{ours}.wq", f"{theirs}.q_proj", square, "interleave_halves", model.attention_bias)
        yield from projection(f"{ours}.wk", f"{theirs}.k_proj", grouped, "interleave_halves", model.attention_bias)
        yield from projection(f"{ours}.wv", f"{theirs}.v_proj", grouped, repeated, model.attention_bias)
        yield from projection(f"{ours}.wo", f"{theirs}.o_proj", square, "as_is", model.output_bias)
        yield norm(f"{layer}.attention_norm", f"{layer}.input_layernorm")
        yield matrix(f"{layer}.feed_forward.w1", f"{layer}.mlp.gate_proj", wide)
        yield matrix(f"{layer}.feed_forward.w2", f"{layer}.mlp.down_proj", wide[::-1])
        yield matrix(f"{layer}.feed_forward.w3", f"{layer}.mlp.up_proj", wide)
        yield norm(f"{layer}.ffn_norm", f"{layer}.post_attention_layernorm")


def _graph(model: Hyperparameters) -> GraphWeights:
    query_rows, key_rows = model.heads * model.head_width, model.key_value_heads * model.head_width
    projections = (
        ("wq", PartRows("interleave_halves", query_rows)),
        ("wk", PartRows("interleave_halves", key_rows)),
        ("wv", PartRows("repeat_heads", key_rows)),
    )
    yield "embedding.weight", (Part("tok_embeddings.weight"),)
    for i in range(model.layers):
        layer = f"layers.{i}"
        yield f"{layer}.attention_norm.weight", (Part(f"{layer}.attention_norm.weight"),)
        for kind in ("weight", "bias"):
            yield f"{layer}.qkv.{kind}", tuple(Part(f"{layer}.attention.{w}.{kind}", rows) for w, rows in projections)
        yield from graph_pair(f"{layer}.attention_out", f"{layer}.attention.wo")
        yield f"{layer}.mlp_norm.weight", (Part(f"{layer}.ffn_norm.weight"),)
        yield f"{layer}.mlp_up.weight", tuple(Part(f"{layer}.feed_forward.{w}.weight") for w in ("w1", "w3"))
        yield f"{layer}.mlp_down.weight", (Part(f"{layer}.feed_forward.w2.weight"),)
    yield "final_norm.weight", (Part("norm.weight"),)
    yield "output.weight", (Part("output.weight"),)


FAMILY = Family(
    name="llama",
    model_types=("llama", "mistral", "qwen2"),
    architectures=(
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "LlamaModel",
        "MistralModel",
        "Qwen2Model",
    ),
    default_repo="decapoda-research/llama-7b-hf",
    alternatives=("huggyllama/llama-7b", "baffo32/decapoda-research-llama-7B-hf"),
    demo_prompt="Q: What is CPU? A:",
    # A transcript that speaks for itself, for base models. The only one with a label for system messages.
    transcript=Transcript("System:", "User:", "Assistant:", ("\nUser:", "\nSystem:")),
    hyperparameters=_hyperparameters,
    layout=Layout(
        "model.", "embed_tokens.weight", "lm_head.weight", re.compile(rf"(layers\.\d+\.self_attn\.)?{ROTARY_BUFFERS}")
    ),
    tensors=_tensors,
    container=Container(ALIGNED, 3, 32, "tok_embeddings.weight", "output.weight"),
    vocabulary="scored_pieces",
    library=NativeLibrary("llama.cpp", init_backend=True),
    graph=_graph,
)
