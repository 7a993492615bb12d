"""Files as torch.save writes them, made without torch, and pickles that nobody should load."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path

from tests.random_checkpoint import Tensors

_STORAGES = {"F16": ("HalfStorage", 2), "BF16": ("BFloat16Storage", 2), "F32": ("FloatStorage", 4)}
_STORAGES |= {"BOOL": ("BoolStorage", 1), "I64": ("LongStorage", 8)}
PROTOCOL_2 = b"\x80\x02"


def write_torch_weights(folder: Path, tensors: Tensors, shards: int = 1, legacy: bool = False) -> None:
    """As pytorch_model.bin, or as `shards` files with an index."""
    write = write_legacy if legacy else write_zip
    if shards == 1:
        write(folder / "pytorch_model.bin", tensors)
        return
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file, part = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin", names[i::shards]
        write(folder / file, {name: tensors[name] for name in part})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_zip(path: Path, tensors: Tensors, pickle: bytes | None = None, byteorder: bytes = b"little") -> None:
    storages = [data for _, _, data in tensors.values()]
    write_archive(path, state_pickle(tensors) if pickle is None else pickle, storages, byteorder)


def write_archive(
    path: Path, pickle: bytes, storages: Iterable[bytes | Iterable[bytes]] = (), byteorder: bytes = b"little"
) -> None:
    """`storages`: each as a whole, or in pieces where it need not be in memory at once."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/byteorder", byteorder)
        for i, data in enumerate(storages):
            entry = zipfile.ZipInfo(f"archive/data/{i}")
            entry.extra = struct.pack("<2sH", b"FB", 5) + b"Z" * 5  # torch pads so; the directory at the end does not
            with archive.open(entry, "w", force_zip64=not isinstance(data, bytes)) as file:
                for piece in [data] if isinstance(data, bytes) else data:
                    file.write(piece)
        archive.writestr("archive/version", b"3\n")


def write_legacy(path: Path, tensors: Tensors) -> None:
    magic = b"\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little") + b"."
    machine = b"}(" + text("little_endian") + b"\x88" + text("protocol_version") + b"M\xe9\x03u."
    keys = b"](" + b"".join(text(str(i)) for i in range(len(tensors))) + b"e."
    content = PROTOCOL_2 + magic + PROTOCOL_2 + b"M\xe9\x03." + PROTOCOL_2 + machine
    content += state_pickle(tensors, legacy=True) + PROTOCOL_2 + keys
    for kind, _, data in tensors.values():
        content += struct.pack("<q", len(data) // _STORAGES[kind][1]) + data
    path.write_bytes(content)


def state_pickle(tensors: Tensors, legacy: bool = False) -> bytes:
    """An OrderedDict of tensors, each with a storage of its own, named by its position."""
    items = b"".join(
        text(name) + tensor(kind, str(i), shape, legacy=legacy)
        for i, (name, (kind, shape, _)) in enumerate(tensors.items())
    )
    metadata = b"}" + text("_metadata") + b"ccollections\nOrderedDict\n)Rsb"
    return PROTOCOL_2 + b"ccollections\nOrderedDict\n)R(" + items + b"u" + metadata + b"."


def tensor(
    kind: str,
    key: str,
    shape: tuple[int, ...],
    *,
    first: int = 0,
    strides: tuple[int, ...] | None = None,
    length: int | None = None,
    legacy: bool = False,
) -> bytes:
    contiguous, count = [], 1
    for size in reversed(shape):
        contiguous.insert(0, count)
        count *= size
    number = integer(count if length is None else length)
    storage = b"(" + text("storage") + f"ctorch\n{_STORAGES[kind][0]}\n".encode() + text(key) + text("cpu") + number
    storage += (b"N" if legacy else b"") + b"tQ"
    rest = integer(first) + numbers(shape) + numbers(tuple(contiguous) if strides is None else strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"\x89ccollections\nOrderedDict\n)RtR"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"
