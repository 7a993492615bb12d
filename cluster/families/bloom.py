"""Family bloom: BLOOM and BLOOMZ."""

from __future__ import annotations

import re
from collections.abc import Iterator

from cluster.families.architecture import Hyperparameters, read_heads, read_layer_norm_epsilon
from cluster.families.config_fields import Config
from cluster.families.family import UNVERSIONED, Container, Family, NativeLibrary, Transcript
from cluster.families.tensors import MASKS, GraphWeights, Layout, Part, TensorRule, graph_pair, weight_and_bias


def _hyperparameters(config: Config, file_type: int) -> Hyperparameters:
    vocabulary, width = config.integer("vocab_size"), config.integer("n_embed", "hidden_size")
    layers = config.integer("num_hidden_layers", "n_layer")
    heads = read_heads(config, width, "num_attention_heads", "n_head")
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
        header=(vocabulary, width, 1, heads, layers, file_type),
        epsilon=read_layer_norm_epsilon(config, "layer_norm_epsilon"),
        activation="gelu_tanh",
    )


def _tensors(model: Hyperparameters) -> Iterator[TensorRule]:
    width, wide = model.width, model.feed_forward
    embedding = (model.vocabulary, width)
    yield TensorRule("tok_embeddings.weight", "word_embeddings.weight", embedding, "quantized")
    yield from weight_and_bias("norm", "word_embeddings_layernorm", (width,))
    for i in range(model.layers):
        ours, theirs = f"layers.{i}", f"h.{i}"
        yield from weight_and_bias(f"{ours}.attention_norm", f"{theirs}.input_layernorm", (width,))
        qkv = "query_key_value"
        yield from weight_and_bias(
            f"{ours}.attention.{qkv}", f"{theirs}.self_attention.{qkv}", (3 * width, width), "split_qkv"
        )
        yield from weight_and_bias(f"{ours}.attention.wo", f"{theirs}.self_attention.dense", (width, width))
        yield from weight_and_bias(f"{ours}.ffn_norm", f"{theirs}.post_attention_layernorm", (width,))
        yield from weight_and_bias(f"{ours}.feed_forward.w1", f"{theirs}.mlp.dense_h_to_4h", (wide, width))
        yield from weight_and_bias(f"{ours}.feed_forward.w2", f"{theirs}.mlp.dense_4h_to_h", (width, wide))
    yield from weight_and_bias("output_norm", "ln_f", (width,))
    yield TensorRule("output.weight", "lm_head.weight", embedding, "quantized")


def _graph(model: Hyperparameters) -> GraphWeights:
    yield "embedding.weight", (Part("tok_embeddings.weight"),)
    yield from graph_pair("embedding_norm", "norm")
    for i in range(model.layers):
        layer = f"layers.{i}"
        yield from graph_pair(f"{layer}.attention_norm", f"{layer}.attention_norm")
        yield from graph_pair(f"{layer}.qkv", f"{layer}.attention.query_key_value")
        yield from graph_pair(f"{layer}.attention_out", f"{layer}.attention.wo")
        yield from graph_pair(f"{layer}.mlp_norm", f"{layer}.ffn_norm")
        yield from graph_pair(f"{layer}.mlp_up", f"{layer}.feed_forward.w1")
        yield from graph_pair(f"{layer}.mlp_down", f"{layer}.feed_forward.w2")
    yield from graph_pair("final_norm", "output_norm")
    yield "output.weight", (Part("output.weight"),)


FAMILY = Family(
    name="bloom",
    model_types=("bloom",),
    architectures=("BloomForCausalLM", "BloomModel"),
    default_repo="bigscience/bloomz-7b1",
    alternatives=("bigscience/bloom-7b1", "bigscience/bloomz-3b"),
    demo_prompt="Q: What is CPU? A:",
    # As bloomz' tasks of questions and answers.
    transcript=Transcript("", "Question:", "Answer:", ("\nQuestion:",)),
    hyperparameters=_hyperparameters,
    layout=Layout(
        "transformer.", "word_embeddings.weight", "lm_head.weight", re.compile(rf"h\.\d+\.self_attention\.{MASKS}")
    ),
    tensors=_tensors,
    container=Container(UNVERSIONED, None, 1, "tok_embeddings.weight", "output.weight"),
    vocabulary="decoded_text",
    # bigdl-llm's own converter refuses bloom in 8 bits.
    library=NativeLibrary("forward", q8_0=False),
    graph=_graph,
)
