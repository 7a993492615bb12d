"""Which stored tensor each tensor of the binary is made from: names, buffers, tied matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.checkpoints.folder import read_config
from cluster.checkpoints.hyperparameters import read_hyperparameters
from cluster.conversion.plan import plan_conversion
from cluster.errors import CheckpointError
from cluster.families import FAMILIES, FamilyName
from tests.random_checkpoint import SHAPES, write_random_checkpoint
from tests.torch_files import write_torch_weights
from tests.unit.changed_checkpoints import change_config, change_tensors, rename_tensors

_FREQUENCIES, _MASK = ("F32", (8,), bytes(32)), ("BOOL", (1, 1, 4, 4), bytes(16))
BUFFERS: dict[FamilyName, dict[str, Any]] = {
    "llama": {
        "model.rotary_emb.inv_freq": _FREQUENCIES,
        "rotary_emb.original_inv_freq": _FREQUENCIES,
        "model.layers.0.self_attn.rotary_emb.inv_freq": _FREQUENCIES,
        "layers.1.self_attn.rotary_emb.cos_cached": _FREQUENCIES,
        "model.layers.1.self_attn.rotary_emb.sin_cached": _FREQUENCIES,
    },
    "gptneox": {
        "gpt_neox.rotary_emb.inv_freq": _FREQUENCIES,
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": _FREQUENCIES,
        "gpt_neox.layers.0.attention.bias": _MASK,
        "gpt_neox.layers.0.attention.masked_bias": ("F32", (), bytes(4)),
    },
    "bloom": {
        "transformer.h.0.self_attention.bias": _MASK,
        "transformer.h.0.self_attention.masked_bias": ("F32", (), bytes(4)),
    },
    "starcoder": {
        "transformer.bias": _MASK,
        "transformer.h.0.attn.bias": _MASK,
        "transformer.h.0.attn.masked_bias": ("F32", (), bytes(4)),
    },
}


def test_buffers_saved_among_the_weights_are_left_out(family: FamilyName, checkpoint: Path) -> None:
    plan = plan_conversion(checkpoint, family)
    change_tensors(checkpoint, lambda tensors: tensors.update(BUFFERS[family]))
    assert plan_conversion(checkpoint, family).entries == plan.entries


# What transformers 5.23 makes of a checkpoint: tie_word_embeddings (None: left out), which matrices are stored, and of
# which the embedding and the output are then. None: it draws the missing one at random, so that nibble refuses.
TIED: list[tuple[bool | None, str, str | None]] = [
    (True, "EO", "EO"),
    (True, "E", "EE"),
    (True, "O", "OO"),
    (False, "EO", "EO"),
    (False, "E", None),
    (False, "O", None),
    (None, "EO", "EO"),
    (None, "E", "by family"),
    (None, "O", "by family"),
]


@pytest.mark.parametrize(("tied", "stored", "expected"), TIED)
def test_embedding_and_output_are_the_matrices_that_transformers_takes(
    family: FamilyName, tied: bool | None, stored: str, expected: str | None, tmp_path: Path
) -> None:
    untied = SHAPES[family]._replace(config=(("tie_word_embeddings", False),))
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", untied)
    layout = FAMILIES[family].layout
    names = {"E": layout.prefix + layout.embedding, "O": layout.output}
    for matrix in set("EO") - set(stored):
        change_tensors(checkpoint, lambda tensors, name=names[matrix]: tensors.pop(name))  # type: ignore[misc]
    change_config(checkpoint, tie_word_embeddings=tied)
    if expected == "by family":
        expected = 2 * stored if family in ("bloom", "starcoder") else None
    if expected is None:
        missing = layout.output if stored == "E" else layout.embedding
        with pytest.raises(CheckpointError, match=f"tensor {missing} is missing; with tie_word_embeddings false"):
            plan_conversion(checkpoint, family)
        return
    sources = {tensor.name: tensor.source.name for tensor in plan_conversion(checkpoint, family).tensors}
    model = read_hyperparameters(checkpoint, read_config(checkpoint), family)
    rules = {rule.source: rule.name for rule in FAMILIES[family].tensors(model)}
    found = (sources[rules[layout.embedding]], sources[rules[layout.output]])
    assert found == (names[expected[0]], names[expected[1]])


@pytest.mark.parametrize("count", [0, 2, 3])
def test_a_prefix_may_be_left_out_or_doubled(family: FamilyName, checkpoint: Path, count: int) -> None:
    plan, layout = plan_conversion(checkpoint, family), FAMILIES[family].layout
    added = {0: "", 2: layout.prefix, 3: 2 * layout.prefix}[count]
    rename_tensors(checkpoint, lambda name: added + (name if added else name.removeprefix(layout.prefix)))
    if count < 3 and (family != "gptneox" or not added):  # transformers finds embed_out without a prefix only
        assert plan_conversion(checkpoint, family).entries == plan.entries
        return
    with pytest.raises(CheckpointError, match=rf"is missing; found ({layout.prefix})+\S+: save the checkpoint anew"):
        plan_conversion(checkpoint, family)


def test_the_reference_s_llama_in_its_own_form_is_for_every_engine(tmp_path: Path) -> None:
    """decapoda-research/llama-7b-hf: the class in other letters, token ids that are not the tokenizer's, .bin files."""
    plan = plan_conversion(write_random_checkpoint(tmp_path / "plain", SHAPES["llama"]), "llama")
    checkpoint = tmp_path / "decapoda"
    write_random_checkpoint(checkpoint, SHAPES["llama"], shards=33, write=write_torch_weights)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}
    change_config(
        checkpoint, architectures=["LLaMAForCausalLM"], max_sequence_length=2048, torch_dtype="float16", **ids
    )
    found = plan_conversion(checkpoint, "llama")
    assert (found.entries, found.head, found.engines) == (plan.entries, plan.head, ("bigdl", "openvino"))


def test_gptneoxs_output_matrix_may_have_the_name_that_others_have(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", SHAPES["gptneox"])
    plan = plan_conversion(checkpoint, "gptneox")
    change_tensors(checkpoint, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("embed_out.weight")}))
    assert plan_conversion(checkpoint, "gptneox").entries == plan.entries


def test_a_tensor_that_is_stored_under_two_names_is_refused(bloom: Path) -> None:
    bias = ("F16", (64,), bytes(128))
    change_tensors(bloom, lambda tensors: tensors.update({"ln_f.bias": bias}))
    with pytest.raises(
        CheckpointError, match=r"tensors (transformer\.)?ln_f\.bias and .* are both ln_f\.bias of a bloom"
    ):
        plan_conversion(bloom, "bloom")


def test_the_prefix_of_a_wrapper_is_named(family: FamilyName, checkpoint: Path) -> None:
    rename_tensors(checkpoint, lambda name: f"module.{name}")
    with pytest.raises(
        CheckpointError, match=r"is missing; found module\.\S+: save the checkpoint anew with the names"
    ):
        plan_conversion(checkpoint, family)
