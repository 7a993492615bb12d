"""Family gptneox: GPT-NeoX, Pythia, RedPajama-INCITE."""

from __future__ import annotations

import re
from collections.abc import Iterator

from cluster.families.architecture import GELU, Hyperparameters, read_feed_forward, read_heads, read_layer_norm_epsilon
from cluster.families.config_fields import Config
from cluster.families.family import ALIGNED, Container, Family, NativeLibrary, Transcript
from cluster.families.rotary import read_rotary, rotary_width
from cluster.families.tensors import (
    MASKS,
    ROTARY_BUFFERS,
    GraphWeights,
    Layout,
    Part,
    PartRows,
    TensorRule,
    graph_pair,
    weight_and_bias,
)

# Layer counts that the library knows: see _check_layers.
_LAYERS = (16, 36, 44)
_WIDTHS_OF_32_LAYERS = (2560, 4096)
_PREFIX = "gpt_neox."


def _hyperparameters(config: Config, file_type: int) -> Hyperparameters:
    vocabulary, width = config.integer("vocab_size"), config.integer("hidden_size")
    context = config.integer("max_position_embeddings", default=2048)
    layers = config.integer("num_hidden_layers")
    heads = read_heads(config, width, "num_attention_heads")
    config.require("attention_bias", True, default=True, why="the attention's biases are added")
    rotary = read_rotary(config, rotary_width(config, width // heads), "rotary_emb_base")
    _check_layers(config, layers, width)
    parallel = config.flag("use_parallel_residual", True)
    return Hyperparameters(
        vocabulary=vocabulary,
        width=width,
        feed_forward=read_feed_forward(config, width, "intermediate_size"),
        heads=heads,
        key_value_heads=heads,
        layers=layers,
        tied=config.flag("tie_word_embeddings", False),
        header=(vocabulary, context, width, heads, layers, rotary.width, int(parallel), file_type),
        epsilon=read_layer_norm_epsilon(config, "layer_norm_eps"),
        activation=GELU[config.choice("hidden_act", choices=tuple(GELU), default="gelu")],
        context=context,
        rotary=rotary,
        parallel_residual=parallel,
    )


def _check_layers(config: Config, layers: int, width: int) -> None:
    """The library picks its buffer sizes by layer count and, at 32 layers, by width, and aborts the process on others.
    Its table is not documented; this one was found by loading heads of 1 to 96 layers at 16 widths from 64 to 12288,
    and of 32 layers at every multiple of 64 up to 12288, with libgptneox_avx512.so 2.4.0 in child processes. Neither
    vocabulary, context nor the parallel residual matter."""
    if layers in _LAYERS or (layers == 32 and width in _WIDTHS_OF_32_LAYERS):
        return
    widths = " or ".join(map(str, _WIDTHS_OF_32_LAYERS))
    config.hinder_bigdl(
        "num_hidden_layers",
        layers,
        f"one of {', '.join(map(str, _LAYERS))}, or 32 with a hidden_size of {widths} (found {width}): the"
        " gptneox runtime aborts on others",
    )


def _tensors(model: Hyperparameters) -> Iterator[TensorRule]:
    width, wide = model.width, model.feed_forward
    embedding = (model.vocabulary, width)

    def same(source: str, *shape: int) -> Iterator[TensorRule]:
        return weight_and_bias(_PREFIX + source, source, shape)

    yield TensorRule(f"{_PREFIX}embed_in.weight", "embed_in.weight", embedding, "quantized")
    for i in range(model.layers):
        layer = f"layers.{i}"
        yield from same(f"{layer}.input_layernorm", width)
        yield from same(f"{layer}.post_attention_layernorm", width)
        yield from same(f"{layer}.attention.query_key_value", 3 * width, width)
        yield from same(f"{layer}.attention.dense", width, width)
        yield from same(f"{layer}.mlp.dense_h_to_4h", wide, width)
        yield from same(f"{layer}.mlp.dense_4h_to_h", width, wide)
    yield from same("final_layer_norm", width)
    yield TensorRule("embed_out.weight", "embed_out.weight", embedding, "quantized")


def _graph(model: Hyperparameters) -> GraphWeights:
    qkv = PartRows("split_qkv", 3 * model.width, undone=False)
    yield "embedding.weight", (Part("gpt_neox.embed_in.weight"),)
    for i in range(model.layers):
        ours, theirs = f"layers.{i}", f"gpt_neox.layers.{i}"
        yield from graph_pair(f"{ours}.attention_norm", f"{theirs}.input_layernorm")
        yield from graph_pair(f"{ours}.qkv", f"{theirs}.attention.query_key_value", qkv)
        yield from graph_pair(f"{ours}.attention_out", f"{theirs}.attention.dense")
        yield from graph_pair(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm")
        yield from graph_pair(f"{ours}.mlp_up", f"{theirs}.mlp.dense_h_to_4h")
        yield from graph_pair(f"{ours}.mlp_down", f"{theirs}.mlp.dense_4h_to_h")
    yield from graph_pair("final_norm", "gpt_neox.final_layer_norm")
    yield "output.weight", (Part("embed_out.weight"),)


FAMILY = Family(
    name="gptneox",
    model_types=("gpt_neox",),
    architectures=("GPTNeoXForCausalLM", "GPTNeoXModel"),
    default_repo="togethercomputer/RedPajama-INCITE-7B-Chat",
    alternatives=("togethercomputer/RedPajama-INCITE-7B-Base", "EleutherAI/pythia-6.9b"),
    demo_prompt="Q: What is CPU? A:",
    # As RedPajama-INCITE-Chat's model card has it.
    transcript=Transcript("", "<human>:", "<bot>:", ("\n<human>:",)),
    hyperparameters=_hyperparameters,
    layout=Layout(
        _PREFIX,
        "embed_in.weight",
        "embed_out.weight",
        re.compile(rf"(layers\.\d+\.attention\.)?{ROTARY_BUFFERS}|layers\.\d+\.attention\.{MASKS}"),
    ),
    tensors=_tensors,
    container=Container(ALIGNED, 1, 32, "gpt_neox.embed_in.weight", "embed_out.weight"),
    vocabulary="spelled_pieces",
    library=NativeLibrary("llama.cpp"),
    graph=_graph,
)
