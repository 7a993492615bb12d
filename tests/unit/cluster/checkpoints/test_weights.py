from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.checkpoints.weights import INDEX_FILE, SINGLE_FILE, WeightsReader, weight_files, weight_sources
from cluster.errors import CheckpointError
from tests.examples import examples
from tests.random_checkpoint import write_safetensors, write_weights

VALUES = np.arange(6, dtype=np.float32).reshape(3, 2)
TENSORS = {
    "a": ("F32", (3, 2), VALUES.astype("<f4").tobytes()),
    "b": ("F16", (3, 2), VALUES.astype("<f2").tobytes()),
    "c": ("BF16", (6,), (VALUES.view(np.uint32) >> 16).astype("<u2").tobytes()),
}


def test_tensors_of_a_single_file_are_found_and_read(tmp_path: Path) -> None:
    write_weights(tmp_path, TENSORS)
    sources = weight_sources(tmp_path)
    assert list(sources) == ["a", "b", "c"]
    with WeightsReader(tmp_path) as reader:
        assert np.array_equal(reader.rows(sources["a"], 0, 3), VALUES)
        half = reader.rows(sources["b"], 1, 3)
        assert half.dtype == np.float16
        assert np.array_equal(half, VALUES[1:])
        bits = reader.rows(sources["c"], 4, 6)
        assert np.array_equal((bits.astype(np.uint32) << 16).view(np.float32), [[4.0], [5.0]])
    assert weight_files(tmp_path) == (SINGLE_FILE,)


def test_tensors_of_several_files_are_found_through_the_index(tmp_path: Path) -> None:
    write_weights(tmp_path, TENSORS, shards=2)
    sources = weight_sources(tmp_path)
    assert {name: source.file[:11] for name, source in sources.items()} == {
        "a": "model-00001",
        "c": "model-00001",
        "b": "model-00002",
    }
    assert weight_files(tmp_path)[0] == INDEX_FILE
    with WeightsReader(tmp_path) as reader:
        assert np.array_equal(reader.rows(sources["b"], 0, 3), VALUES)


def test_files_may_be_symbolic_links_as_in_the_hubs_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    write_safetensors(blobs / "0123", TENSORS)
    (snapshot / SINGLE_FILE).symlink_to(Path("..", "blobs", "0123"))
    assert len(weight_sources(snapshot)) == 3


@pytest.mark.parametrize("keep", [0, 5, 8, 60, -1])
def test_a_truncated_file_is_refused(keep: int, tmp_path: Path) -> None:
    path = tmp_path / SINGLE_FILE
    write_safetensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: (truncated|not a safetensors file)"):
        weight_sources(tmp_path)


def test_a_file_that_shrank_after_planning_is_refused(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_FILE
    write_safetensors(path, TENSORS)
    source = weight_sources(tmp_path)["c"]
    path.write_bytes(path.read_bytes()[:-2])
    with WeightsReader(tmp_path) as reader, pytest.raises(CheckpointError, match="ends inside tensor c"):
        reader.rows(source, 0, 6)


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "corrupt header"),
        (b"[]", "found a JSON list, allowed is an object"),
        (b'{"a": 1}', "corrupt header at tensor a: found 1"),
        (json.dumps({"a": ENTRY | {"shape": ["1"]}}).encode(), "corrupt header at tensor a"),
        (json.dumps({"a": ENTRY | {"shape": [-1]}}).encode(), "corrupt header at tensor a"),
        (json.dumps({"a": ENTRY | {"shape": [2]}}).encode(), "found 4 bytes, F32 of shape .2. takes 8"),
        (json.dumps({"a": ENTRY | {"data_offsets": [4, 0]}}).encode(), "corrupt header at tensor a"),
        (json.dumps({"a": ENTRY | {"data_offsets": [0]}}).encode(), "corrupt header at tensor a"),
        (json.dumps({"a": ENTRY | {"data_offsets": [0, 400]}}).encode(), "truncated: tensor a ends at byte"),
    ],
)
def test_a_corrupt_header_is_refused(header: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match=message):
        weight_sources(tmp_path)


def entry(begin: int, end: int, **changes: Any) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]} | changes


# Header, bytes of data, and what nibble says; None: it is sound.
LAYOUTS: list[tuple[Any, int, str | None]] = [
    ({"a": entry(0, 4), "b": entry(4, 8)}, 8, None),
    ({"b": entry(4, 8), "a": entry(0, 4)}, 8, None),
    ({"a": entry(0, 0), "b": entry(0, 4), "c": entry(4, 4)}, 4, None),
    ({"a": entry(0, 4, further=1), "__metadata__": {"format": "pt"}}, 4, None),
    ({"a": entry(0, 4), "__metadata__": None}, 4, None),
    ({"a": entry(0, 3, shape=[4], dtype="F6_E2M3")}, 3, None),
    ({"a": entry(0, 2, shape=[4], dtype="F4")}, 2, None),
    ({"a": entry(0, 4)}, 5, "1 bytes follow the last tensor"),
    ({}, 1, "1 bytes follow the last tensor"),
    ({"a": entry(1, 4)}, 4, "tensor a begins at byte .* allowed are neither gaps nor overlaps"),
    ({"a": entry(0, 4), "b": entry(5, 8)}, 8, "tensor b begins at byte .* neither gaps nor overlaps"),
    ({"a": entry(0, 4), "b": entry(3, 8)}, 8, "tensor b begins at byte .* neither gaps nor overlaps"),
    ({"a": entry(0, 4), "b": entry(0, 4)}, 4, "tensor b begins at byte .* neither gaps nor overlaps"),
    ({"a": entry(2, 2), "b": entry(0, 4)}, 4, "tensor a begins at byte .* neither gaps nor overlaps"),
    ({"a": entry(0, 4), "b": entry(4, 8)}, 7, "truncated: tensor b"),
    ({"a": entry(0, 4, shape=[1], dtype="I64")}, 4, "found 4 bytes, I64 of shape .1. takes 8"),
    ({"a": entry(0, 2, shape=[3], dtype="F4")}, 2, "found 2 bytes, F4 of shape .3. takes 1 and 4 bits"),
    ({"a": entry(0, 4, dtype="F12")}, 4, "found type 'F12'; allowed are F64,"),
    ({"a": entry(0, 4, dtype="u8")}, 4, "found type 'u8'"),
    ({"a": entry(0, 4), "__metadata__": {"a": 1}}, 4, "__metadata__: found .*, allowed is an object of texts"),
    ({"a": entry(0, 4), "__metadata__": []}, 4, "__metadata__: found .*, allowed is an object of texts"),
    ({"a": entry(0, 1, shape=[1.0])}, 1, "corrupt header at tensor a"),
    (b"\xef\xbb\xbf{}", 0, "corrupt header"),
    ("{}".encode("utf-16"), 0, "corrupt header"),
    (b'{"\xff": {}}', 0, "corrupt header"),
]


@pytest.mark.parametrize(("header", "length", "message"), LAYOUTS)
def test_what_the_safetensors_library_refuses_is_refused(
    header: Any, length: int, message: str | None, tmp_path: Path
) -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = len(encoded).to_bytes(8, "little") + encoded + bytes(length)
    (tmp_path / SINGLE_FILE).write_bytes(content)
    if message is None:
        assert set(weight_sources(tmp_path)) == {name for name, _ in safetensors.deserialize(content)}
        return
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(content)
    with pytest.raises(CheckpointError, match=rf"{SINGLE_FILE}: .*{message}"):
        weight_sources(tmp_path)


def test_an_absurd_header_length_is_refused(tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        weight_sources(tmp_path)


@settings(max_examples=examples(120, 300), suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(position=st.integers(0, 250), byte=st.integers(0, 255))
def test_a_damaged_byte_is_refused_or_harmless(position: int, byte: int, tmp_path: Path) -> None:
    path = tmp_path / SINGLE_FILE
    write_safetensors(path, TENSORS)
    content = bytearray(path.read_bytes())
    content[position] = byte
    path.write_bytes(content)
    try:
        sources = weight_sources(tmp_path)
        safetensors.deserialize(bytes(content))  # what it refuses was refused
        with WeightsReader(tmp_path) as reader:
            for source in sources.values():
                reader.rows(source, 0, source.shape[0] if source.shape else 1)
    except CheckpointError:
        pass


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", "sub/model.safetensors", "", "a\\b", 3])
def test_an_index_that_points_outside_the_folder_is_refused(name: object, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_safetensors(tmp_path / SINGLE_FILE, TENSORS)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="allowed are names of files in the same folder"):
        weight_sources(folder)


def test_an_index_that_names_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "config.json"}}))
    with pytest.raises(CheckpointError, match=r"allowed are \.safetensors files"):
        weight_sources(tmp_path)


def test_an_index_that_names_a_missing_file_is_refused(tmp_path: Path) -> None:
    write_weights(tmp_path, TENSORS, shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names model-00002-of-00002\.safetensors, which is not in the folder"):
        weight_sources(tmp_path)


def test_an_index_that_names_a_tensor_its_file_lacks_is_refused(tmp_path: Path) -> None:
    write_weights(tmp_path, TENSORS, shards=2)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    index["weight_map"]["d"] = index["weight_map"]["a"]
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="holds d, which it does not"):
        weight_sources(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "found a JSON list, allowed is an object"),
        ("{}", "weight_map: found None, allowed is an object"),
        ('{"weight_map": []}', r"weight_map: found \[\], allowed is an object"),
        ('{"weight_map": {"a": ["b"]}}', r"names \['b'\]; allowed are names of files"),
        ("\ufeff{}", "weight_map: found None"),
    ],
)
def test_a_corrupt_index_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{INDEX_FILE}: {message}"):
        weight_sources(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights; allowed is model\.safetensors"):
        weight_sources(tmp_path)
