"""What engine openvino alone runs is converted by the same rules: from the plan to the numbers in the tensors."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cluster.artifacts.manifest import Manifest
from cluster.checkpoints.hyperparameters import read_hyperparameters
from cluster.checkpoints.weights import WeightsReader, weight_sources
from cluster.conversion.layouts import output_rows
from cluster.conversion.plan import plan_conversion
from cluster.errors import ArtifactError, EngineError
from cluster.families.rotary import Rotary
from cluster.machine.isa import choose_isa
from deployments.engines.bigdl.model import load_model
from deployments.engines.check import check_artifact
from tests.conftest import convert_here
from tests.random_checkpoint import OPENVINO_SHAPES, write_lively_weights, write_random_checkpoint

Array = npt.NDArray[np.float32]
BLOCK = np.dtype([("scale", "<f2"), ("nibbles", "u1", 32)])


class Converted:
    """A shape's checkpoint and artifact, and the tensors of both by name."""

    def __init__(self, name: str, folder: Path) -> None:
        self.shape = OPENVINO_SHAPES[name]
        self.checkpoint = write_random_checkpoint(folder / "checkpoint", self.shape, write=write_lively_weights)
        self.artifact = convert_here(self.checkpoint, self.shape.family, folder / "artifact")
        self.manifest = Manifest.read(self.artifact)
        self.binary = (self.artifact / self.manifest.binary).read_bytes()

    def tensor(self, name: str) -> Array:
        """Its numbers, dequantized."""
        entry = next(tensor for tensor in self.manifest.tensors if tensor.name == name)
        data = self.binary[entry.offset : entry.offset + entry.bytes]
        if entry.type == "f32":
            return np.frombuffer(data, "<f4").reshape(entry.shape)
        blocks = np.frombuffer(data, BLOCK)
        nibbles = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=1).astype(np.float32) - 8
        return (nibbles * blocks["scale"].astype(np.float32)[:, None]).reshape(entry.shape)

    def source(self, name: str) -> Array:
        source = weight_sources(self.checkpoint)[name]
        with WeightsReader(self.checkpoint) as reader:
            rows = reader.rows(source, 0, source.shape[0])
        if source.type == "BF16":
            return (rows.astype(np.uint32) << 16).view(np.float32).reshape(source.shape)
        return rows.astype(np.float32).reshape(source.shape)


@pytest.fixture(params=OPENVINO_SHAPES)
def converted(request: pytest.FixtureRequest, tmp_path: Path) -> Converted:
    return Converted(request.param, tmp_path)


def assert_quantized(found: Array, expected: Array) -> None:
    """Within a step: a block's greatest weight is a scale times -8, and what would be 8 becomes 7."""
    blocks = np.abs(expected.reshape(-1, 64))
    steps = blocks.max(axis=1, keepdims=True) / 8
    assert found.shape == expected.shape
    assert (np.abs(found - expected).reshape(-1, 64) <= steps * 1.01 + 1e-6).all()


def test_it_is_for_engine_openvino_and_its_config_says_the_same(converted: Converted) -> None:
    plan = plan_conversion(converted.checkpoint, converted.shape.family)
    assert converted.manifest.engines == plan.engines == ("openvino",)
    assert [engine for engine, _ in plan.obstacles] == ["bigdl"]
    family = converted.shape.family
    configs = [
        json.loads((folder / "config.json").read_text()) for folder in (converted.checkpoint, converted.artifact)
    ]
    checkpoint, artifact = (
        read_hyperparameters(folder, config, family)._replace(obstacles=())
        for folder, config in zip((converted.checkpoint, converted.artifact), configs, strict=True)
    )
    assert checkpoint == artifact


def test_every_byte_is_planned_once_and_every_matrix_holds_its_weights(converted: Converted) -> None:
    plan = plan_conversion(converted.checkpoint, converted.shape.family)
    end = len(plan.head)
    for tensor in plan.tensors:
        assert tensor.start == end
        end = tensor.offset + tensor.bytes
        rows = output_rows(tensor.rows, tensor.heads, tensor.head_width, tensor.source.shape[0])
        expected = converted.source(tensor.source.name)[rows]
        found = converted.tensor(tensor.name)
        if tensor.type == "f32":
            assert np.array_equal(found, expected.astype(np.float16).astype(np.float32) if tensor.rounded else expected)
        else:
            assert_quantized(found, expected)
    assert end == plan.bytes == len(converted.binary)


def test_biases_follow_their_weights_with_rows_in_the_same_order(tmp_path: Path) -> None:
    """Against the order spelled out: halves of a head interleaved, each of 2 heads for 2 query heads."""
    qwen2 = Converted("qwen2", tmp_path)
    names = [tensor.name for tensor in qwen2.manifest.tensors]
    for kind in "qkv":
        position = names.index(f"layers.1.attention.w{kind}.weight")
        assert names[position + 1] == f"layers.1.attention.w{kind}.bias"
    assert "layers.1.attention.wo.bias" not in names
    query = qwen2.source("model.layers.1.self_attn.q_proj.bias").reshape(4, 2, 16).swapaxes(1, 2)
    assert np.array_equal(qwen2.tensor("layers.1.attention.wq.bias"), query.reshape(-1))
    key = qwen2.source("model.layers.1.self_attn.k_proj.bias").reshape(2, 2, 16).swapaxes(1, 2).reshape(2, 32)
    assert np.array_equal(qwen2.tensor("layers.1.attention.wk.bias"), key[[0, 0, 1, 1]].reshape(-1))
    value = qwen2.source("model.layers.1.self_attn.v_proj.bias").reshape(2, 32)
    assert np.array_equal(qwen2.tensor("layers.1.attention.wv.bias"), value[[0, 0, 1, 1]].reshape(-1))


def test_a_llama_with_biases_keeps_them_in_float32_and_has_one_after_the_attention(tmp_path: Path) -> None:
    llama = Converted("llama-biases", tmp_path)
    output = llama.source("model.layers.0.self_attn.o_proj.bias")
    assert not np.array_equal(output, output.astype(np.float16))
    assert np.array_equal(llama.tensor("layers.0.attention.wo.bias"), output)


EXPECTED: dict[str, dict[str, Any]] = {
    "llama3": {
        "heads": 8,
        "key_value_heads": 2,
        "epsilon": 1e-5,
        "tied": True,
        "rotary": Rotary(
            width=16,
            base=500000.0,
            scaling=(
                ("factor", 8.0),
                ("low_freq_factor", 1.0),
                ("high_freq_factor", 4.0),
                ("original_max_position_embeddings", 64.0),
            ),
            kind="llama3",
        ),
        "header": (320, 128, 448, 8, 3, 16, 2),
    },
    "mistral": {"key_value_heads": 2, "sliding_window": 16, "rotary": Rotary(32, 10000.0), "attention_bias": False},
    "qwen2": {
        "attention_bias": True,
        "output_bias": False,
        "sliding_window": None,
        "rotary": Rotary(32, 1e6),
        "header": (384, 128, 0, 4, 3, 32, 2),
    },
    "llama-one-head": {"heads": 1, "head_width": 64},
    "gptneox-shallow": {"rotary": Rotary(4, 1e6), "epsilon": 1e-6, "activation": "gelu_tanh", "feed_forward": 192},
    "bloom-epsilon": {"epsilon": 1e-6, "rotary": None, "key_value_heads": 4, "activation": "gelu_tanh"},
    "starcoder-epsilon": {"epsilon": 1e-6, "key_value_heads": 1, "feed_forward": 128, "context": 96},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_hyperparameters(name: str, tmp_path: Path) -> None:
    shape = OPENVINO_SHAPES[name]
    checkpoint = write_random_checkpoint(tmp_path, shape)
    config = json.loads((checkpoint / "config.json").read_text())
    model = read_hyperparameters(checkpoint, config, shape.family)
    assert {field: getattr(model, field) for field in EXPECTED[name]} == EXPECTED[name]


def test_the_check_is_of_the_engine_that_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[tuple[Path, int]] = []
    module = types.ModuleType("deployments.engines.openvino.self_check")
    module.check_openvino = lambda folder, threads: checked.append((folder, threads))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    mistral = Converted("mistral", tmp_path)
    check_artifact(mistral.artifact, threads=3)
    assert checked == [(mistral.artifact, 3)]
    (mistral.artifact / mistral.manifest.binary).write_bytes(mistral.binary[:-1])
    with pytest.raises(ArtifactError, match="the manifest puts"):
        check_artifact(mistral.artifact, threads=3)
    assert len(checked) == 1


def test_bigdls_library_never_sees_it(tmp_path: Path) -> None:
    qwen2 = Converted("qwen2", tmp_path)
    with pytest.raises(EngineError, match=r"engine: found bigdl, this llama artifact allows openvino"):
        load_model(qwen2.artifact, threads=1, context=64, isa=choose_isa())
