"""Family starcoder: GPTBigCode, as StarCoder and SantaCoder in its form are."""

from __future__ import annotations

import re
from collections.abc import Iterator

from cluster.families.architecture import GELU, Hyperparameters, read_feed_forward, read_heads, read_layer_norm_epsilon
from cluster.families.config_fields import Config
from cluster.families.family import UNVERSIONED, Container, Family, NativeLibrary, Transcript
from cluster.families.tensors import (
    MASKS,
    GraphWeights,
    Layout,
    Part,
    PartRows,
    TensorRule,
    graph_pair,
    weight_and_bias,
)


def _hyperparameters(config: Config, file_type: int) -> Hyperparameters:
    vocabulary, width = config.integer("vocab_size"), config.integer("hidden_size", "n_embd")
    context = config.integer("max_position_embeddings", "n_positions")
    layers = config.integer("num_hidden_layers", "n_layer")
    heads = read_heads(config, width, "num_attention_heads", "n_head")
    config.require("multi_query", True, default=True, why="its one key and value head is repeated for every head")
    config.require("scale_attn_weights", True, default=True, why="attention weights are scaled")
    config.require("add_cross_attention", False, default=False, why="there is a decoder only")
    return Hyperparameters(
        vocabulary=vocabulary,
        width=width,
        feed_forward=read_feed_forward(config, width, "n_inner"),
        heads=heads,
        key_value_heads=1,
        layers=layers,
        tied=config.flag("tie_word_embeddings", True),
        header=(vocabulary, context, width, heads, layers, file_type, vocabulary),
        epsilon=read_layer_norm_epsilon(config, "layer_norm_epsilon"),
        activation=GELU[config.choice("activation_function", choices=tuple(GELU), default="gelu_pytorch_tanh")],
        context=context,
    )


def _tensors(model: Hyperparameters) -> Iterator[TensorRule]:
    width, wide = model.width, model.feed_forward
    embedding = (model.vocabulary, width)
    attention = (width + 2 * model.head_width, width)
    linear, norm = ("/w", "/b"), ("/g", "/b")
    yield TensorRule("model/wte", "wte.weight", embedding, "quantized")
    yield TensorRule("model/wpe", "wpe.weight", (model.context, width), "f32")
    for i in range(model.layers):
        ours, theirs = f"model/h{i}", f"h.{i}"
        yield from weight_and_bias(f"{ours}/ln_1", f"{theirs}.ln_1", (width,), suffixes=norm)
        yield from weight_and_bias(f"{ours}/attn/c_attn", f"{theirs}.attn.c_attn", attention, "repeat_kv", linear)
        yield from weight_and_bias(f"{ours}/attn/c_proj", f"{theirs}.attn.c_proj", (width, width), suffixes=linear)
        yield from weight_and_bias(f"{ours}/ln_2", f"{theirs}.ln_2", (width,), suffixes=norm)
        yield from weight_and_bias(f"{ours}/mlp/c_fc", f"{theirs}.mlp.c_fc", (wide, width), suffixes=linear)
        yield from weight_and_bias(f"{ours}/mlp/c_proj", f"{theirs}.mlp.c_proj", (width, wide), suffixes=linear)
    yield from weight_and_bias("model/ln_f", "ln_f", (width,), suffixes=norm)
    yield TensorRule("model/lm_head", "lm_head.weight", embedding, "quantized")


def _graph(model: Hyperparameters) -> GraphWeights:
    qkv = PartRows("repeat_kv", model.width + 2 * model.head_width)
    linear, norm = ("/w", "/b"), ("/g", "/b")
    yield "embedding.weight", (Part("model/wte"),)
    yield "position_embedding.weight", (Part("model/wpe"),)
    for i in range(model.layers):
        ours, theirs = f"layers.{i}", f"model/h{i}"
        yield from graph_pair(f"{ours}.attention_norm", f"{theirs}/ln_1", suffixes=norm)
        yield from graph_pair(f"{ours}.qkv", f"{theirs}/attn/c_attn", qkv, suffixes=linear)
        yield from graph_pair(f"{ours}.attention_out", f"{theirs}/attn/c_proj", suffixes=linear)
        yield from graph_pair(f"{ours}.mlp_norm", f"{theirs}/ln_2", suffixes=norm)
        yield from graph_pair(f"{ours}.mlp_up", f"{theirs}/mlp/c_fc", suffixes=linear)
        yield from graph_pair(f"{ours}.mlp_down", f"{theirs}/mlp/c_proj", suffixes=linear)
    yield from graph_pair("final_norm", "model/ln_f", suffixes=norm)
    yield "output.weight", (Part("model/lm_head"),)


FAMILY = Family(
    name="starcoder",
    model_types=("gpt_bigcode",),
    # LMHeadModel: BigCode's own fork of transformers, before the model was in transformers.
    architectures=("GPTBigCodeForCausalLM", "GPTBigCodeLMHeadModel", "GPTBigCodeModel"),
    default_repo="bigcode/gpt_bigcode-santacoder",
    alternatives=("bigcode/tiny_starcoder_py",),
    demo_prompt="def print_hello_world():",
    # As the Tech Assistant prompt (bigcode/ta-prompt).
    transcript=Transcript("", "Human:", "Assistant:", ("\nHuman:", "\n-----")),
    hyperparameters=_hyperparameters,
    layout=Layout("transformer.", "wte.weight", "lm_head.weight", re.compile(rf"(h\.\d+\.attn\.)?{MASKS}")),
    tensors=_tensors,
    container=Container(UNVERSIONED, None, 1, "model/wte", "model/lm_head", positions="model/wpe", file_type_base=2000),
    vocabulary="raw_bytes",
    library=NativeLibrary("forward"),
    graph=_graph,
)
