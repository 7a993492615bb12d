"""The openvino engine's graph against transformers, which computed tests/reference/logits with the same weights."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as op

from cluster.artifacts import verified
from cluster.artifacts.manifest import Manifest, Quantization
from cluster.checkpoints.folder import read_config
from cluster.checkpoints.hyperparameters import read_hyperparameters
from cluster.conversion.layouts import output_rows
from cluster.families import FAMILIES, FAMILY_NAMES, FamilyName
from cluster.machine.isa import cpu_flags
from deployments.engines.base import Logits
from deployments.engines.openvino.batching.paged_cache import BLOCK_TOKENS
from deployments.engines.openvino.derived_weights import (
    DERIVED_VERSION,
    DerivedWeights,
    QuantizedMatrix,
    derived_weights,
)
from deployments.engines.openvino.graph_parts import graph_parts
from deployments.engines.openvino.paged_model import PagedModel, PagedSettings, Work
from deployments.engines.openvino.probe import EXACT, candidates, choose_settings
from deployments.engines.openvino.self_check import check_openvino
from deployments.engines.products.layout import PRODUCT_FLAGS, wants_tiles
from deployments.engines.products.operation import Q4Product
from deployments.engines.products.threads import Q4Threads
from tests.conftest import convert_here
from tests.ggml_weights import dequantize
from tests.random_checkpoint import (
    OPENVINO_SHAPES,
    SHAPES,
    TIED_SHAPES,
    write_lively_weights,
    write_random_checkpoint,
)

REFERENCE = Path(__file__).parents[2] / "reference"
RANDOM = {path.stem for path in (REFERENCE / "logits").glob("*.npz")} - set(FAMILY_NAMES)
# nibble's own products, where this CPU has what they need: settings, and whether the weights are in tiles.
TILES = [(PagedSettings(), True)] if cpu_flags() >= PRODUCT_FLAGS else []
Artifact = Callable[[FamilyName], Path]


class Expected(NamedTuple):
    ids: list[int]
    logits: Logits


def expected(name: str) -> Expected:
    stored = np.load(REFERENCE / "logits" / f"{name}.npz")
    return Expected(stored["input_ids"].tolist(), stored["logits"].astype(np.float32))


def loaded(folder: Path, settings: PagedSettings, blocks: int = 16, in_tiles: bool = False) -> PagedModel:
    weights, model = derived_weights(folder, in_tiles=in_tiles)
    assert weights.in_tiles == in_tiles
    paged = PagedModel(weights, model, threads=1, settings=settings)
    paged.allocate(blocks)
    return paged


def at_once(paged: PagedModel, ids: Sequence[int]) -> Logits:
    return paged.step([Work(ids, 0, table_for(ids), range(len(ids)))])[0].copy()


def one_by_one(paged: PagedModel, ids: Sequence[int]) -> Logits:
    table = table_for(ids)
    return np.stack([paged.step([Work([token], i, table, [0])])[0][0].copy() for i, token in enumerate(ids)])


def table_for(ids: Sequence[int]) -> list[int]:
    """Blocks in an order of their own."""
    return list(range(-(-len(ids) // BLOCK_TOKENS)))[::-1]


def relative_rms(found: Logits, wanted: Logits) -> float:
    """Over all positions, each around its mean (softmax ignores an offset)."""
    found, wanted = (rows - rows.mean(axis=1, keepdims=True) for rows in (found, wanted))
    return float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))


@pytest.fixture(scope="module")
def random_artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[str, str], Path] = {}

    def artifact(name: str, quantization: Quantization = "q4_0") -> Path:
        if (name, quantization) not in made:
            folder, shape = tmp_path_factory.mktemp(name), {**SHAPES, **OPENVINO_SHAPES, **TIED_SHAPES}[name]
            write_random_checkpoint(folder / "checkpoint", shape, write=write_lively_weights)
            made[name, quantization] = convert_here(
                folder / "checkpoint", shape.family, folder / "artifact", quantization
            )
        return made[name, quantization]

    return artifact


def test_every_shape_that_only_this_engine_runs_has_a_reference() -> None:
    assert set(OPENVINO_SHAPES) | set(TIED_SHAPES) <= RANDOM


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_logits_are_those_of_transformers_with_the_same_weights(family: FamilyName, demo_artifact: Artifact) -> None:
    wanted = expected(family)
    exact = loaded(demo_artifact(family), PagedSettings("f32", quantized_activations=False, cache="f32"))
    assert relative_rms(at_once(exact, wanted.ids), wanted.logits) < 0.001
    assert relative_rms(one_by_one(exact, wanted.ids), wanted.logits) < 0.001


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_fastest_settings_stay_within_two_percent_of_transformers(
    family: FamilyName, demo_artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = expected(family)
    for settings, in_tiles in [*((settings, False) for settings in candidates(frozenset({"amx_bf16"}))), *TILES]:
        paged = loaded(demo_artifact(family), settings, in_tiles=in_tiles)
        errors = [relative_rms(compute(paged, wanted.ids), wanted.logits) for compute in (at_once, one_by_one)]
        with capsys.disabled():
            print(f"\n{family}, {settings}, {paged.products}: relative RMS {errors[0]:.4f}, {errors[1]:.4f} one by one")
        assert max(errors) < 0.02


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_int4_agrees_with_fp32_on_at_least_nine_of_ten_next_tokens(
    family: FamilyName, demo_artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = json.loads((REFERENCE / "agreement" / f"{family}.json").read_text())
    for settings, in_tiles in [(PagedSettings(), False), *TILES]:
        paged = loaded(demo_artifact(family), settings, in_tiles=in_tiles)
        logits = at_once(paged, reference["input_ids"])
        agreement = float(np.mean(logits.argmax(axis=1) == reference["greedy_next"]))
        with capsys.disabled():
            print(f"\n{family}, openvino, products by {paged.products}: INT4 and fp32 agree on {agreement:.1%}")
        assert agreement >= 0.9


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_other_forms_of_a_model_have_the_logits_of_transformers(
    name: str, random_artifact: Callable[..., Path]
) -> None:
    wanted = expected(name)
    exact = loaded(random_artifact(name), PagedSettings("f32", quantized_activations=False, cache="f32"))
    assert relative_rms(at_once(exact, wanted.ids), wanted.logits) < 0.002
    assert relative_rms(one_by_one(exact, wanted.ids), wanted.logits) < 0.002
    for settings, in_tiles in TILES:
        rounded = loaded(random_artifact(name), settings, in_tiles=in_tiles)
        assert 0 < relative_rms(at_once(rounded, wanted.ids), wanted.logits) < 0.05
        assert 0 < relative_rms(one_by_one(rounded, wanted.ids), wanted.logits) < 0.05


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_sequences_in_one_step_do_not_see_each_other(family: FamilyName, demo_artifact: Artifact) -> None:
    paged, ids = loaded(demo_artifact(family), EXACT), expected(family).ids
    alone = at_once(paged, ids)
    other = [(token * 7 + 1) % paged.vocab_size for token in ids[:40]]
    paged.step([Work(other, 0, [4, 5], [0])])
    works = [Work(ids, 0, [2, 3], range(len(ids))), Work(other[:1], 40, [4, 5], [0]), Work(other[:20], 0, [6], [19])]
    logits, hidden = paged.step(works)
    assert logits.shape == (len(ids) + 2, paged.vocab_size)
    assert hidden.shape[0] == len(ids) + 2
    assert relative_rms(logits[: len(ids)], alone) < 0.001


@pytest.mark.parametrize("in_tiles", [False, True])
@pytest.mark.parametrize("name", ["llama-grouped", "qwen2", "gptneox", "bloom-wide", "starcoder-wide"])
def test_weights_are_the_artifacts_own_numbers_tensor_by_tensor(
    name: str, in_tiles: bool, random_artifact: Callable[..., Path]
) -> None:
    folder = random_artifact(name)
    manifest, (weights, model) = Manifest.read(folder), derived_weights(folder, in_tiles=in_tiles)
    assert weights.in_tiles == in_tiles
    data, entries = np.fromfile(folder / manifest.binary, np.uint8), {t.name: t for t in manifest.tensors}
    compared = set()
    for ours, parts in graph_parts(manifest.family, model, entries):
        pieces = []
        for part in parts:
            entry = entries[part.tensor]
            piece = data[entry.offset : entry.offset + entry.bytes]
            numbers = (
                piece.view("<f4").reshape(entry.shape)
                if entry.type == "f32"
                else dequantize(piece, entry.type, entry.shape)
            )
            pieces.append(numbers if part.rows is None else numbers[part.rows])
            compared.add(part.tensor)
        assert np.array_equal(numbers_of(weights, ours, parts[0].tensor, entries), np.concatenate(pieces)), ours
    assert compared == set(entries)


def numbers_of(weights: DerivedWeights, name: str, tensor: str, entries: dict) -> np.ndarray:  # type: ignore[type-arg]
    if entries[tensor].type == "f32":
        return weights.array(name)
    return from_tiles(*weights.tiles(name)) if weights.tiled(name) else as_floats(weights.matrix(name))


def from_tiles(tiles: np.ndarray, rows: int) -> np.ndarray:  # type: ignore[type-arg]
    quads = tiles[..., :512].reshape(*tiles.shape[:2], 16, 8, 4)
    values = np.stack([quads & 0x0F, quads >> 4], axis=2).transpose(0, 2, 4, 1, 3, 5).reshape(len(tiles) * 16, -1)
    scales = np.ascontiguousarray(tiles[..., 512:]).view("<f2").astype(np.float32).transpose(0, 2, 1)
    floats: np.ndarray = (values.astype(np.float32) - 8) * np.repeat(scales.reshape(len(values), -1), 64, axis=1)  # type: ignore[type-arg]
    return floats[:rows]


def as_floats(matrix: QuantizedMatrix) -> np.ndarray:  # type: ignore[type-arg]
    values = matrix.values
    if matrix.type == "i4":
        nibbles = np.stack([values & 0x0F, values >> 4], axis=-1).reshape(matrix.shape).astype(np.int8)
        values = np.where(nibbles > 7, nibbles - 16, nibbles)
    return values.astype(np.float32) * np.repeat(matrix.scales.astype(np.float32), 64, axis=1)


def test_grouped_heads_are_kept_once(random_artifact: Callable[..., Path]) -> None:
    """The artifact repeats each key and value head for bigdl; here the Hub's rows come back in their order."""
    folder = random_artifact("llama-grouped")
    weights, model = derived_weights(folder)
    rows = (model.heads + 2 * model.key_value_heads) * model.head_width
    assert weights.matrix("layers.0.qkv.weight").shape == (rows, model.width)
    rule = next(r for r in FAMILIES["llama"].tensors(model) if r.name.endswith("wk.weight"))
    assert rule.source_shape[0] == model.key_value_heads * model.head_width
    assert len(output_rows(rule.rows, model.heads, model.head_width, rule.source_shape[0])) == model.width


@pytest.mark.parametrize("family", ["llama", "gptneox", "starcoder"])
def test_8_bit_artifacts_run_too(family: FamilyName, random_artifact: Callable[..., Path]) -> None:
    name = {"llama": "llama-grouped", "gptneox": "gptneox-tied", "starcoder": "starcoder-wide"}[family]
    wanted = expected(name)  # of 4-bit weights: 8-bit ones are other numbers, but not very different ones
    four, eight = (loaded(random_artifact(name, kind), EXACT) for kind in ("q4_0", "q8_0"))
    assert 0.001 < relative_rms(at_once(eight, wanted.ids), wanted.logits) < 0.5
    assert relative_rms(one_by_one(eight, wanted.ids), at_once(eight, wanted.ids)) < 0.01
    assert not np.allclose(at_once(eight, wanted.ids), at_once(four, wanted.ids))


def test_a_second_start_reads_no_file_to_verify_it(
    random_artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = random_artifact("bloom-wide")
    derived_weights(folder)
    derived_weights(folder)  # a stamp from the very tick of the file's last change is not trusted

    def refuse(path: Path) -> str:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(verified, "file_sha256", refuse)
    derived_weights(folder)


def test_probes_are_closed_before_the_model_is_compiled(
    random_artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, model = derived_weights(random_artifact("llama3"))
    closed = []
    close = PagedModel.close
    monkeypatch.setattr(PagedModel, "close", lambda self: (closed.append(self), close(self)))
    choose_settings(weights, model, 1, "throughput")
    assert len(closed) == len(candidates(cpu_flags()))


def test_what_was_derived_is_used_again_and_made_anew_where_it_is_damaged(random_artifact: Callable[..., Path]) -> None:
    folder = random_artifact("starcoder-wide")
    derived_weights(folder)
    binary = folder / f"openvino-{DERIVED_VERSION}.bin"
    content, first = binary.read_bytes(), binary.stat().st_ino
    derived_weights(folder)
    assert binary.stat().st_ino == first
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    binary.write_bytes(flipped)
    derived_weights(folder)
    assert binary.read_bytes() == content
    (folder / f"openvino-{DERIVED_VERSION}.json").write_text("{")
    derived_weights(folder)
    assert not list(folder.glob(".openvino.*"))


def test_the_check_passes_sound_artifacts_and_finds_a_damaged_one(
    random_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    folder = random_artifact("qwen2")
    assert "bigdl" not in Manifest.read(folder).engines
    check_openvino(folder, threads=1)
    assert not list(folder.parent.glob(".check*"))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in folder.iterdir():
        if path.is_file() and not path.name.startswith("openvino"):
            (damaged / path.name).write_bytes(path.read_bytes())
    manifest = Manifest.read(damaged)
    norm = next(t for t in manifest.tensors if t.name == "norm.weight")
    data = bytearray((damaged / manifest.binary).read_bytes())
    data[norm.offset : norm.offset + norm.bytes] = bytes(norm.bytes)
    (damaged / manifest.binary).write_bytes(data)
    with pytest.raises(Exception, match="do not depend on the token"):
        check_openvino(damaged, threads=1)


def test_settings_are_chosen_by_trying_them_or_by_asking_for_precision(random_artifact: Callable[..., Path]) -> None:
    weights, model = derived_weights(random_artifact("llama3"))
    assert choose_settings(weights, model, 1, "precision") == EXACT
    assert choose_settings(weights, model, 1, "latency") in candidates(frozenset({"amx_bf16"}))
    assert all(settings.precision == "f32" for settings in candidates(frozenset({"avx2"})))


def test_openvino_never_frees_an_operation_of_python() -> None:
    """Where this fails, OpenVINO has mended it, and Q4Threads need no `end`: see operation.py."""
    operation = Q4Product([op.parameter([-1, 64], ov.Type.f32).output(0)], 0, 16, Q4Threads(1))
    alive = weakref.ref(operation)
    del operation
    gc.collect()
    assert alive() is not None


def test_products_are_nibbles_own_where_openvino_has_none_in_integers() -> None:
    assert wants_tiles("throughput", PRODUCT_FLAGS)
    assert not wants_tiles("precision", PRODUCT_FLAGS)
    assert not wants_tiles("latency", PRODUCT_FLAGS | {"avx512_vnni"})
    assert not wants_tiles("latency", PRODUCT_FLAGS | {"avx_vnni"})
    assert not wants_tiles("throughput", frozenset({"avx2"}))


def test_hyperparameters_are_read_from_the_artifact(random_artifact: Callable[..., Path]) -> None:
    folder = random_artifact("llama3")
    assert read_hyperparameters(folder, read_config(folder), "llama").key_value_heads == 2
