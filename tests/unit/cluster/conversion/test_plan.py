from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from cluster.checkpoints.weights import SINGLE_FILE, TensorSource, WeightsReader
from cluster.conversion.plan import ConversionPlan, plan_conversion
from cluster.errors import CheckpointError, ConfigError
from cluster.families import FamilyName
from deployments.generation.text import Tokenizer
from tests.random_checkpoint import SHAPES, Shape, write_random_checkpoint
from tests.unit.changed_checkpoints import change_config, change_tensors

CTC = {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True}


def test_plan_covers_every_byte_once(family: FamilyName, checkpoint: Path) -> None:
    plan = plan_conversion(checkpoint, family, shard_bytes=20_000)
    end = len(plan.head)
    for tensor in plan.tensors:
        assert tensor.start == end
        end = tensor.offset + tensor.bytes
    assert end == plan.bytes
    assert len(plan.shards) > 1
    assert [s.index for s in plan.shards] == [*range(len(plan.shards))]
    assert sum(s.bytes for s in plan.shards) == plan.bytes
    assert plan.shards[0].offset == 0
    for before, after in zip(plan.shards, plan.shards[1:], strict=False):
        assert (before.stop, before.offset + before.bytes) == (after.first, after.offset)
        assert after.offset == plan.tensors[after.first].start
    assert plan.shards[-1].stop == len(plan.tensors)


def test_shards_are_no_larger_than_asked_unless_one_tensor_is(family: FamilyName, checkpoint: Path) -> None:
    plan = plan_conversion(checkpoint, family, shard_bytes=20_000)
    assert all(s.bytes <= 20_000 or s.stop == s.first + 1 for s in plan.shards)
    assert len(plan_conversion(checkpoint, family).shards) == 1


def test_plan_reads_no_weights_and_survives_pickling(family: FamilyName, checkpoint: Path) -> None:
    def never(*_: object) -> None:
        raise AssertionError("weights were read")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightsReader, "rows", never)
        plan = plan_conversion(checkpoint, family)
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert [entry.name for entry in plan.entries] == [tensor.name for tensor in plan.tensors]
    assert "config.json" in plan.files
    assert plan.checkpoint == str(checkpoint)


def test_tensor_entries_have_numpys_shapes(bloom: Path) -> None:
    entries = {entry.name: entry for entry in plan_conversion(bloom, "bloom").entries}
    assert entries["tok_embeddings.weight"].shape == (300, 64)
    assert entries["layers.0.attention.query_key_value.bias"].shape == (192,)
    assert entries["layers.0.feed_forward.w1.weight"].bytes == 256 * 34


def test_starcoders_key_and_value_grow_to_full_heads(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", SHAPES["starcoder"])
    plan = plan_conversion(checkpoint, "starcoder")
    attention = next(t for t in plan.tensors if t.name == "model/h0/attn/c_attn/w")
    assert (attention.source.shape, attention.shape) == ((96, 64), (192, 64))


def test_unknown_family_and_quantization_and_shard_size_are_refused(bloom: Path) -> None:
    for arguments, message in (
        ({"family": "gpt2"}, "family: found 'gpt2', allowed are llama, gptneox, bloom, starcoder"),
        ({"quantization": "q5_1"}, "quantization: found 'q5_1', allowed are q4_0, q8_0"),
        ({"quantization": "q8_0"}, "found q8_0, family bloom allows q4_0; q8_0 is for llama, gptneox, starcoder"),
        ({"shard_bytes": 0}, "shard_bytes: found 0"),
    ):
        values: dict[str, Any] = {"family": "bloom", **arguments}
        with pytest.raises(ConfigError, match=message):
            plan_conversion(bloom, **values)


def test_a_family_that_does_not_fit_is_refused_and_the_right_one_named(bloom: Path) -> None:
    allowed = "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, LlamaModel, MistralModel, Qwen2Model"
    with pytest.raises(
        CheckpointError, match=rf"found BloomForCausalLM; family llama allows {allowed}; this is family"
    ):
        plan_conversion(bloom, "llama")
    for other in ("T5ForConditionalGeneration", "BloomForSequenceClassification"):
        change_config(bloom, architectures=[other])
        with pytest.raises(CheckpointError, match=f"architectures: found {other}.*no family of nibble fits"):
            plan_conversion(bloom, "bloom")
    change_config(bloom, architectures=None, model_type="gpt_neox")
    with pytest.raises(CheckpointError, match=r"model_type: found 'gpt_neox'.*this is family gptneox"):
        plan_conversion(bloom, "bloom")
    for architectures, model_type in ((["MistralForCausalLM"], None), (None, "qwen2")):
        change_config(bloom, architectures=architectures, model_type=model_type)
        with pytest.raises(CheckpointError, match="this is family llama: convert it as that"):
            plan_conversion(bloom, "bloom")
    change_config(bloom, architectures=None, model_type="bloom")
    assert plan_conversion(bloom, "bloom").family == "bloom"


def test_a_checkpoint_without_tokenizer_is_refused(family: FamilyName, checkpoint: Path) -> None:
    for path in checkpoint.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.(model|json)"):
        plan_conversion(checkpoint, family)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", '{"version": "1.0", "added'),
        ("tokenizer_config.json", '{"a":' * 100_000),
        ("tokenizer_config.json", '{"eos_token": 2}'),
        ("added_tokens.json", '["a"]'),
    ],
)
def test_a_tokenizer_that_a_replica_could_not_load_is_refused(
    name: str, content: str, family: FamilyName, checkpoint: Path
) -> None:
    (checkpoint / name).write_text(content)
    with pytest.raises(CheckpointError, match=name):
        plan_conversion(checkpoint, family)


def test_a_decoder_that_cannot_be_streamed_is_refused(bloom: Path) -> None:
    path = bloom / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"decoder": CTC}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: decoder: found CTC, allowed are ByteLevel"):
        plan_conversion(bloom, "bloom")


@pytest.mark.parametrize("added", [None, {"<unk>": 0, "<s>": 1, "</s>": 2, "<added>": 300}])
def test_a_llama_may_have_more_embeddings_than_tokens(added: dict[str, int] | None, tmp_path: Path) -> None:
    shape = SHAPES["llama-added-tokens"]._replace(vocabulary=320, tokens=300)
    checkpoint = write_random_checkpoint(tmp_path, shape)
    (checkpoint / "added_tokens.json").unlink()
    if added is not None:
        (checkpoint / "added_tokens.json").write_text(json.dumps(added))
    # Empty names, as decapoda-research/llama-7b-hf has them.
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(dict.fromkeys(("bos_token", "eos_token"), "")))
    plan = plan_conversion(checkpoint, "llama")
    assert plan.tensors[0].shape[0] == 320
    assert Tokenizer(checkpoint).encode("a")[0] == 1


def test_a_truncated_weights_file_is_refused(family: FamilyName, checkpoint: Path) -> None:
    path = checkpoint / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        plan_conversion(checkpoint, family)


def test_a_missing_tensor_is_refused(bloom: Path) -> None:
    change_tensors(bloom, lambda tensors: tensors.pop("transformer.h.1.input_layernorm.bias"))
    with pytest.raises(
        CheckpointError, match=r"tensor h\.1\.input_layernorm\.bias is missing; a bloom model of 3 layers has it"
    ):
        plan_conversion(bloom, "bloom")


def test_more_layers_in_config_than_in_the_weights_are_refused(bloom: Path) -> None:
    change_config(bloom, n_layer=2_000_000_000)
    with pytest.raises(CheckpointError, match=r"tensor h\.3\.input_layernorm\.weight is missing"):
        plan_conversion(bloom, "bloom")


def test_a_wrong_shape_is_refused(bloom: Path) -> None:
    change_config(bloom, vocab_size=2_000_000_000)
    message = r"word_embeddings\.weight has shape \[300, 64\], allowed is \[2000000000, 64\]"
    with pytest.raises(CheckpointError, match=message):
        plan_conversion(bloom, "bloom")


def test_a_tensor_that_the_family_has_no_place_for_is_refused(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", SHAPES["llama"])
    bias = ("F16", (64,), bytes(128))
    change_tensors(checkpoint, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": bias}))
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.bias have no place in a llama model"):
        plan_conversion(checkpoint, "llama")


def test_a_type_that_cannot_be_read_is_refused(bloom: Path) -> None:
    name = "transformer.word_embeddings.weight"
    change_tensors(bloom, lambda tensors: tensors.update({name: ("F8_E4M3", (300, 64), bytes(300 * 64))}))
    with pytest.raises(CheckpointError, match=r"has type F8_E4M3; allowed are F16, BF16, F32"):
        plan_conversion(bloom, "bloom")


@pytest.mark.parametrize(
    ("shape", "columns"),
    [
        (Shape("llama", layers=26, feed_forward=352, width=128), 352),
        (Shape("gptneox", layers=16, width=96), 96),
        (Shape("bloom", width=160), 160),
        (Shape("starcoder", width=32), 32),
    ],
)
def test_rows_that_are_no_multiple_of_64_are_refused(shape: Shape, columns: int, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", shape)
    with pytest.raises(CheckpointError, match=rf"rows of {columns} weights, allowed are multiples of 64"):
        plan_conversion(checkpoint, shape.family)


def test_a_layer_count_that_the_library_aborts_on_is_an_obstacle_to_bigdl(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", SHAPES["gptneox"]._replace(layers=3))
    plan = plan_conversion(checkpoint, "gptneox")
    ((engine, obstacle),) = plan.obstacles
    assert (engine, plan.engines) == ("bigdl", ("openvino",))
    assert obstacle.startswith(f"{checkpoint}/config.json: num_hidden_layers: found 3, allowed is one of 16")
    assert obstacle.endswith("aborts on others; engine openvino runs it")


def test_a_checkpoint_without_obstacles_is_for_every_engine(family: FamilyName, checkpoint: Path) -> None:
    plan = plan_conversion(checkpoint, family)
    assert (plan.engines, plan.obstacles) == (("bigdl", "openvino"), ())


def test_sources_name_the_file_and_offset_of_each_tensor(bloom: Path) -> None:
    plan: ConversionPlan = plan_conversion(bloom, "bloom")
    source: TensorSource = plan.tensors[0].source
    assert (source.name, source.file, source.shape) == ("transformer.word_embeddings.weight", SINGLE_FILE, (300, 64))
    assert plan.tensors[0].source == plan.tensors[-1].source  # tied: the output is the embedding written again
