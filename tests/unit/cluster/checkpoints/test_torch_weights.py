from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.checkpoints.weights import (
    TORCH_FILE,
    TORCH_INDEX_FILE,
    WeightsReader,
    require_convertible,
    weight_files,
    weight_sources,
)
from cluster.errors import CheckpointError
from tests.examples import examples
from tests.random_checkpoint import write_weights
from tests.torch_files import (
    PROTOCOL_2,
    state_pickle,
    tensor,
    text,
    write_archive,
    write_legacy,
    write_torch_weights,
    write_zip,
)

REFERENCE = Path(__file__).parents[3] / "reference"
VALUES = np.arange(6, dtype=np.float32).reshape(3, 2)
TENSORS = {
    "a": ("F32", (3, 2), VALUES.astype("<f4").tobytes()),
    "b": ("F16", (3, 2), VALUES.astype("<f2").tobytes()),
    "c": ("BF16", (6,), (VALUES.view(np.uint32) >> 16).astype("<u2").tobytes()),
    "mask": ("BOOL", (1, 1, 2, 2), b"\1\0\1\1"),
}


def assert_values(folder: Path, names: str = "abc") -> None:
    sources = weight_sources(folder)
    with WeightsReader(folder) as reader:
        for name in names:
            rows = reader.rows(sources[name], 0, sources[name].shape[0])
            if rows.dtype == np.uint16:
                rows = (rows.astype(np.uint32) << 16).view(np.float32)
            assert np.array_equal(rows.reshape(3, 2), VALUES), name


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("shards", [1, 2])
def test_tensors_are_found_and_read(shards: int, legacy: bool, tmp_path: Path) -> None:
    write_torch_weights(tmp_path, TENSORS, shards, legacy)
    assert_values(tmp_path)
    sources = weight_sources(tmp_path)
    assert {name: (s.type, s.shape) for name, s in sources.items()} == {n: t[:2] for n, t in TENSORS.items()}
    assert weight_files(tmp_path)[0] == (TORCH_FILE if shards == 1 else TORCH_INDEX_FILE)
    assert len(weight_files(tmp_path)) == (1 if shards == 1 else 3)


@pytest.mark.parametrize("name", ["torch_zip.bin", "torch_legacy.bin"])
def test_files_that_torch_itself_wrote_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / TORCH_FILE).write_bytes((REFERENCE / name).read_bytes())
    assert_values(tmp_path, "abcd")
    sources = weight_sources(tmp_path)
    assert sources["tied"].offset == sources["a"].offset
    assert sources["half"].offset == sources["a"].offset + 8  # rows 1 and 2 of a, in the same storage
    assert sources["transposed"].type == "F32 with strides [1, 2]"
    assert sources["mask"].type == "BOOL"
    with pytest.raises(CheckpointError, match=r"tensor transposed has type F32 with strides \[1, 2\]; allowed are F16"):
        require_convertible(sources["transposed"])


def test_safetensors_come_first_as_in_transformers(tmp_path: Path) -> None:
    write_torch_weights(tmp_path, TENSORS)
    write_weights(tmp_path, TENSORS, shards=2)
    assert weight_files(tmp_path)[0] == "model.safetensors.index.json"
    (tmp_path / "model.safetensors.index.json").unlink()
    assert weight_files(tmp_path) == (TORCH_FILE,)


def test_an_index_names_bin_files_only(tmp_path: Path) -> None:
    (tmp_path / TORCH_INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"allowed are \.bin files"):
        weight_sources(tmp_path)


class Call:
    """Pickles to a call of any function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.function, self.arguments


def evil(target: Path) -> list[tuple[object, str]]:
    command, code = f"touch {target}", f"open({str(target)!r}, 'w')"
    inner = Call(os.system, command)
    return [
        (Call(os.system, command), "posix.system"),
        (Call(eval, code), "builtins.eval|__builtin__.eval"),
        (Call(exec, code), "builtins.exec|__builtin__.exec"),
        ({"a": Call(os.system, command)}, "posix.system"),
        ({"a": [{"b": (inner, inner)}]}, "posix.system"),
        (Call(getattr, inner, "x"), "builtins.getattr|__builtin__.getattr"),
        (Call(__import__, "os"), "builtins.__import__|__builtin__.__import__"),
        (Call(target.write_text, "x"), "builtins.getattr|__builtin__.getattr"),
    ]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("case", range(8))
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_calls_something_is_refused_and_not_run(
    case: int, protocol: int, zipped: bool, tmp_path: Path
) -> None:
    target = tmp_path / "was-run"
    value, name = evil(target)[case]
    content = pickle.dumps(value, protocol)
    if zipped:
        write_archive(tmp_path / TORCH_FILE, content)
    else:
        (tmp_path / TORCH_FILE).write_bytes(content)
    allowed = f"names '({name})', which was not looked up" + ("|has the instruction" if protocol < 2 else "")
    with pytest.raises(CheckpointError, match=allowed):
        weight_sources(tmp_path)
    assert not target.exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"ctorch\nload\n.", "names 'torch.load'"),
        (b"ctorch._utils\n_rebuild_tensor_v3\n.", "names 'torch._utils._rebuild_tensor_v3'"),
        (b"ctorch.storage\nUntypedStorage\n.", "names 'torch.storage.UntypedStorage'"),
        (b"(cos\nsystem\no.", "names 'os.system'"),
        (b"(S'touch x'\nios\nsystem\n.", "instruction STRING"),
        (b"(" + text("touch x") + b"ios\nsystem\n.", "instruction INST"),
        (b"ccollections\nOrderedDict\n(" + text("x") + b"tR.", "calls collections.OrderedDict with other arguments"),
        (text("x") + b")R.", "calls a str with other arguments"),
        (b"ctorch._utils\n_rebuild_parameter\n)R.", "calls torch._utils._rebuild_parameter with other"),
        (b"ccollections\nOrderedDict\n}b.", "sets attributes of something that is no dictionary"),
        (b"ccollections\nOrderedDict\n)\x81.", "instruction NEWOBJ"),
        (b"\x82\x01.", "instruction EXT1"),
        (b"}(" + text("a") + b"K\x01u.", "'a' is a int, allowed are tensors by name"),
        (b"}(" + text("model") + b"}u.", "'model' is a dict, allowed are tensors by name: save the model's state_dict"),
        (b"}(K\x01u.", "not a file of torch.save"),
        (b"}()K\x01u.", "keys that are neither texts nor numbers"),
        (b"].", "holds a list, allowed is a dictionary"),
        (b"K\x01K\x01a.", "appends to something that is no list"),
        (b"K\x01(K\x01K\x02u.", "sets keys of something that is no dictionary"),
        (text("storage") + b"Q.", "refers to something else than a storage"),
        (b"0.", "instruction POP"),
        (b"\x86.", "takes values that it never made"),
        (b"h\x07.", "not a file of torch.save"),
        (b"}", "not a file of torch.save"),
        (b"", "not a file of torch.save"),
        (b"\x8d" + b"\xff" * 8 + b".", "not a file of torch.save"),
    ],
)
def test_a_pickle_that_is_no_dictionary_of_tensors_is_refused(body: bytes, message: str, tmp_path: Path) -> None:
    write_archive(tmp_path / TORCH_FILE, PROTOCOL_2 + body)
    with pytest.raises(CheckpointError, match=rf"{TORCH_FILE}: .*{message}"):
        weight_sources(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (tensor("F32", "0", (3, 2), first=1), "tensor a ends behind its storage of 6"),
        (tensor("F32", "0", (3, 2), length=5), "tensor a ends behind its storage of 5"),
        (tensor("F32", "0", (3, 3)), "storage '0' is of 24 bytes, 36 are needed"),
        (tensor("F32", "7", (3, 2)), "storage '7' is missing"),
        (tensor("F32", "../data.pkl", (1,)), "storage '../data.pkl' is missing"),
        (tensor("F32", "0", (3, -2), length=6), "calls torch._utils._rebuild_tensor_v2 with other arguments"),
        (tensor("F32", "0", (3, 2), first=-1), "calls torch._utils._rebuild_tensor_v2 with other arguments"),
        (tensor("F32", "0", (3, 2), strides=(2,)), "calls torch._utils._rebuild_tensor_v2 with other arguments"),
        (tensor("F32", "0", (3, 2), length=-1), "something else than a storage"),
    ],
)
def test_a_tensor_that_does_not_fit_its_storage_is_refused(entry: bytes, message: str, tmp_path: Path) -> None:
    state = PROTOCOL_2 + b"}" + text("a") + entry + b"s."
    write_zip(tmp_path / TORCH_FILE, {"a": TENSORS["a"]}, state)
    with pytest.raises(CheckpointError, match=message):
        weight_sources(tmp_path)


def test_a_pickle_that_grows_without_end_is_refused_quickly(tmp_path: Path) -> None:
    doubled = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(99))
    bomb = b"K\x01" + doubled  # a pair of the same pair of the same pair ...
    write_archive(tmp_path / TORCH_FILE, PROTOCOL_2 + b"}" + text("a") + bomb + b"s.")
    with pytest.raises(CheckpointError, match="'a' is a tuple"):
        weight_sources(tmp_path)
    (tmp_path / TORCH_FILE).write_bytes(PROTOCOL_2 + bomb + b".")
    with pytest.raises(CheckpointError, match="magic number"):
        weight_sources(tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_a_truncated_file_is_refused(share: float, legacy: bool, tmp_path: Path) -> None:
    write_torch_weights(tmp_path, TENSORS, legacy=legacy)
    path = tmp_path / TORCH_FILE
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: .*(truncated|download it again)"):
        weight_sources(tmp_path)


# Of the standard library, about a damaged string in a pickle.
@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
@settings(max_examples=examples(150, 400), suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(position=st.integers(0, 1100), byte=st.integers(0, 255), legacy=st.booleans())
def test_a_damaged_byte_is_refused_or_harmless(position: int, byte: int, legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / TORCH_FILE
    (write_legacy if legacy else write_zip)(path, TENSORS)
    content = bytearray(path.read_bytes())
    content[position % len(content)] = byte
    path.write_bytes(content)
    try:
        sources = weight_sources(tmp_path)
        with WeightsReader(tmp_path) as reader:
            for source in sources.values():
                require_convertible(source)
                reader.rows(source, 0, source.shape[0] if source.shape else 1)
    except CheckpointError:
        pass


def test_compressed_entries_and_big_endian_numbers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / TORCH_FILE
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", state_pickle(TENSORS))
    with pytest.raises(CheckpointError, match=r"archive/data\.pkl is compressed"):
        weight_sources(tmp_path)
    write_zip(path, TENSORS, byteorder=b"big")
    with pytest.raises(CheckpointError, match="byteorder: found b'big', allowed is little"):
        weight_sources(tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", b"")
    with pytest.raises(CheckpointError, match="a zip file with 0 entries"):
        weight_sources(tmp_path)
