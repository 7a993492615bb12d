"""Where the tensors lie in a file that torch.save wrote (pytorch_model.bin), without torch and without unpickling.

A pickle is a program: unpickling one calls whatever it names. Here its opcodes are only read, by an interpreter that
knows the few of them that a state dict is written with and calls nothing: a tensor is a record of where its numbers
lie, and any other name than those in the tables below is refused. Two formats:

zip     since torch 1.6: uncompressed entries NAME/data.pkl and NAME/data/KEY, one a storage: the raw numbers that one
        or several tensors share (`cluster.checkpoints.torch_archive`).
legacy  before: pickles of a magic number, a version, facts of the machine, the state dict and the list of the
        storages' keys, one after another; then, in that order, each storage's length as an int64 and its numbers.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeGuard

from cluster.artifacts.digests import stream_sha256
from cluster.checkpoints.torch_archive import (
    ZIP_START,
    ArchiveEntry,
    DamagedEntryError,
    MalformedError,
    archive_entries,
    checked_sha256,
)
from cluster.errors import CheckpointError

_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_MAX_PICKLE_BYTES = 100_000_000  # as for a header of safetensors

# The element types of storages: the word that safetensors has for each, and its bytes.
_STORAGES: dict[str, tuple[str, int]] = {
    "torch.HalfStorage": ("F16", 2),
    "torch.BFloat16Storage": ("BF16", 2),
    "torch.FloatStorage": ("F32", 4),
    "torch.DoubleStorage": ("F64", 8),
    "torch.LongStorage": ("I64", 8),
    "torch.IntStorage": ("I32", 4),
    "torch.ShortStorage": ("I16", 2),
    "torch.CharStorage": ("I8", 1),
    "torch.ByteStorage": ("U8", 1),
    "torch.BoolStorage": ("BOOL", 1),
}


class StoredTensor(NamedTuple):
    """`type` is safetensors' word; with the strides behind it where the rows do not lie one after another."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int  # in the file


class _Global(NamedTuple):
    name: str


class _Storage(NamedTuple):
    type: str
    item_bytes: int
    key: str
    length: int


class _Tensor(NamedTuple):
    storage: _Storage
    first: int  # the position of its first number in the storage
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def stored_tensors(file: BinaryIO, path: Path) -> list[StoredTensor]:
    """The tensors of an open file. Raises CheckpointError, naming `path`, for a file that torch.save did not write,
    that is truncated, or whose pickle does anything but hold a dictionary of tensors."""
    try:
        state, begin_of = _read_zip(file) if _begins_as_zip(file) else _read_legacy(file)
        return [_placed(name, tensor, begin_of) for name, tensor in _tensors(state)]
    except MalformedError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (ValueError, TypeError, LookupError, MemoryError, NotImplementedError, OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path}: not a file of torch.save, or truncated: download it again ({error!r:.200})"
        ) from error


def file_sha256(file: BinaryIO, path: Path) -> str:
    """Of the whole open file, which `stored_tensors` accepts. Raises CheckpointError, naming the tensors, where bytes
    of a zip file do not have the CRC-32 that it says. (The legacy format has no checksum.)"""
    if not _begins_as_zip(file):
        return stream_sha256(file)
    try:
        return checked_sha256(file)
    except DamagedEntryError as error:
        entry = error.entry
        names = [t.name for t in stored_tensors(file, path) if entry.begin <= t.offset < entry.end]
        what = f"tensor {', '.join(names)}" if names else f"entry {entry.name}"
        raise CheckpointError(
            f"{path}: {what} is damaged: its bytes have the CRC-32 {error.found:08x}, the file says"
            f" {entry.crc32:08x}: download the file again"
        ) from error


def _begins_as_zip(file: BinaryIO) -> bool:
    file.seek(0)
    begins = file.read(len(ZIP_START)) == ZIP_START
    file.seek(0)
    return begins


def _tensors(state: object) -> list[tuple[str, _Tensor]]:
    if not isinstance(state, dict):
        raise MalformedError(f"holds a {type(state).__name__}, allowed is a dictionary of tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise MalformedError(
                f"{name!r:.100} is a {type(value).__name__.lstrip('_').lower()}, allowed are tensors by name: save the"
                " model's state_dict alone"
            )
    return list(state.items())


def _placed(name: str, tensor: _Tensor, begin_of: Callable[[_Storage], int]) -> StoredTensor:
    storage, count, contiguous = tensor.storage, 1, []
    for length in reversed(tensor.shape):
        contiguous.append(count)
        count *= length
    pairs = zip(tensor.shape, tensor.strides, reversed(contiguous), strict=True)
    if count and any(stride != expected for length, stride, expected in pairs if length > 1):
        kind = f"{storage.type} with strides {list(tensor.strides)}"
    elif tensor.first + count > storage.length:
        raise MalformedError(f"tensor {name} ends behind its storage of {storage.length} numbers: download it again")
    else:
        kind = storage.type
    return StoredTensor(name, kind, tensor.shape, begin_of(storage) + tensor.first * storage.item_bytes)


def _read_zip(file: BinaryIO) -> tuple[object, Callable[[_Storage], int]]:
    """The unpickled state dict, and where in the file a storage begins."""
    entries = archive_entries(file)
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise MalformedError(f"a zip file with {len(pickles)} entries NAME/data.pkl, torch.save writes 1")
    folder = pickles[0].removesuffix("data.pkl")

    def content(entry: ArchiveEntry) -> bytes:
        if entry.bytes > _MAX_PICKLE_BYTES:
            raise MalformedError(f"entry {entry.name} has {entry.bytes} bytes, allowed {_MAX_PICKLE_BYTES}")
        file.seek(entry.begin)
        return file.read(entry.bytes)

    def begin_of(storage: _Storage) -> int:
        entry = entries.get(f"{folder}data/{storage.key}")
        needed = storage.length * storage.item_bytes
        if entry is None or entry.bytes < needed:
            found = "missing" if entry is None else f"of {entry.bytes} bytes"
            raise MalformedError(f"storage {storage.key!r:.40} is {found}, {needed} are needed: download it again")
        return entry.begin

    order = entries.get(f"{folder}byteorder")
    if order is not None and (found := content(order)) != b"little":
        raise MalformedError(f"byteorder: found {found!r:.40}, allowed is little")
    return _Interpreter().run(BytesIO(content(entries[pickles[0]]))), begin_of


def _read_legacy(file: BinaryIO) -> tuple[object, Callable[[_Storage], int]]:
    is_magic = _Interpreter().run(file) == _LEGACY_MAGIC
    _require(is_magic, "not a file of torch.save, neither a zip file nor with its magic number: download it again")
    is_known = _Interpreter().run(file) == _LEGACY_VERSION
    _require(is_known, f"its version is not {_LEGACY_VERSION}, the only one there was")
    machine = _Interpreter().run(file)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise MalformedError("written on a big-endian machine, allowed are little-endian numbers")
    interpreter = _Interpreter()
    state, keys = interpreter.run(file), _Interpreter().run(file)
    if not isinstance(keys, list):
        raise MalformedError(f"storage keys: found a {type(keys).__name__}, allowed is a list")
    begins: dict[str, int] = {}
    position, size = file.tell(), file.seek(0, 2)
    for key in keys:
        storage = interpreter.storages[key]
        file.seek(position)
        length = int.from_bytes(file.read(8), "little")
        begins[key], position = position + 8, position + 8 + length * storage.item_bytes
        if length != storage.length or position > size:
            raise MalformedError(f"storage {key!r:.40} ends at byte {position}, the file at {size}: download it again")
    return state, lambda storage: begins[storage.key]


class _Interpreter:
    """Reads one pickle. Tuples, lists, dictionaries, strings and numbers are made, tensors recorded, nothing called."""

    def __init__(self) -> None:
        self.storages: dict[str, _Storage] = {}
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, file: BinaryIO) -> object:
        """The value of the pickle that begins here; the file is then behind it."""
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                break
            self._step(opcode.name, argument)
        return self._stack.pop()

    def _step(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self._marks.append(len(stack))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._take(int(opcode[-1]))))
            case "TUPLE":
                stack.append(tuple(self._take_marked()))
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "APPEND":
                self._extend(self._take(1))
            case "APPENDS":
                self._extend(self._take_marked())
            case "SETITEM":
                self._set(self._take(2))
            case "SETITEMS":
                self._set(self._take_marked())
            case "GLOBAL":
                stack.append(_allowed(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                stack.append(_allowed(".".join(self._take(2))))
            case "REDUCE":
                stack.append(_made(*self._take(2)))
            case "BUILD":  # attributes of an OrderedDict: torch keeps the versions of modules there
                self._take(1)
                _require(isinstance(stack[-1], dict), "sets attributes of something that is no dictionary")
            case "BINPERSID":
                storage = _storage(stack.pop())
                self.storages[storage.key] = storage
                stack.append(storage)
            case _:
                raise MalformedError(f"its pickle has the instruction {opcode}, which no dictionary of tensors needs")

    def _take(self, count: int) -> list[Any]:
        _require(len(self._stack) >= count, "its pickle takes values that it never made")
        values = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return values

    def _take_marked(self) -> list[Any]:
        return self._take(len(self._stack) - self._marks.pop())

    def _extend(self, values: list[Any]) -> None:
        _require(isinstance(self._stack[-1], list), "appends to something that is no list")
        self._stack[-1].extend(values)

    def _set(self, values: list[Any]) -> None:
        keys = values[0::2]
        _require(isinstance(self._stack[-1], dict), "sets keys of something that is no dictionary")
        _require(all(isinstance(key, str | int) for key in keys), "has keys that are neither texts nor numbers")
        self._stack[-1].update(zip(keys, values[1::2], strict=True))


_CALLED = ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")


def _allowed(name: str) -> _Global:
    if name in _CALLED or name in _STORAGES:
        return _Global(name)
    raise MalformedError(
        f"its pickle names {name!r:.200}, which was not looked up; allowed are {', '.join(_CALLED)} and torch's"
        " storages of numbers: load this file nowhere; take a safetensors checkpoint, or save the state_dict alone"
    )


def _made(function: object, arguments: object) -> object:
    """What calling the function would give."""
    match function, arguments:
        case _Global("collections.OrderedDict"), ():
            return {}
        case _Global("torch._utils._rebuild_parameter"), (_Tensor() as tensor, *_):
            return tensor
        case _Global("torch._utils._rebuild_tensor_v2"), (_Storage() as storage, int(first), shape, strides, *_):
            if _lengths(shape) and _lengths(strides) and len(shape) == len(strides) and first >= 0:
                return _Tensor(storage, first, shape, strides)
    name = function.name if isinstance(function, _Global) else f"a {type(function).__name__}"
    raise MalformedError(f"its pickle calls {name} with other arguments than torch writes")


def _storage(identity: object) -> _Storage:
    """torch's persistent id: 'storage', element type, key, device, length, and in the legacy format a view (unused)."""
    match identity:
        case ("storage", _Global(kind), str(key), str(), int(length), *rest) if kind in _STORAGES and length >= 0:
            if rest in ([], [None]):
                return _Storage(*_STORAGES[kind], key, length)
    raise MalformedError("its pickle refers to something else than a storage of torch")


def _lengths(value: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(value, tuple) and all(type(number) is int and number >= 0 for number in value)


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise MalformedError(otherwise)
