"""The tensors and parameters of the Open Inference Protocol as Python values, and back."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cluster.errors import InvalidRequestError
from protos import open_inference_pb2 as pb

BYTES = "BYTES"

# Of each datatype the field of InferTensorContents and, where it has a fixed size, the raw element.
DATATYPES: dict[str, tuple[str, str]] = {
    "BOOL": ("bool_contents", "?"),
    "INT8": ("int_contents", "<i1"),
    "INT16": ("int_contents", "<i2"),
    "INT32": ("int_contents", "<i4"),
    "INT64": ("int64_contents", "<i8"),
    "UINT8": ("uint_contents", "<u1"),
    "UINT16": ("uint_contents", "<u2"),
    "UINT32": ("uint_contents", "<u4"),
    "UINT64": ("uint64_contents", "<u8"),
    "FP32": ("fp32_contents", "<f4"),
    "FP64": ("fp64_contents", "<f8"),
    BYTES: ("bytes_contents", ""),
}


class Tensor(NamedTuple):
    name: str
    datatype: str
    shape: tuple[int, ...]
    values: list[Any]  # row-major; of BYTES strings

    def single(self) -> Any:
        """Raises InvalidRequestError for any number of elements but one."""
        if len(self.values) != 1:
            raise InvalidRequestError(f"{self.name}: found {len(self.values)} elements, expected 1", self.name)
        return self.values[0]


def input_tensors(request: pb.ModelInferRequest) -> dict[str, Tensor]:
    """By name. Raises InvalidRequestError for what does not fit together."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequestError(
            f"raw_input_contents: found {len(raw)} for {len(request.inputs)} inputs; each input needs its own",
            "raw_input_contents",
        )
    tensors: dict[str, Tensor] = {}
    for index, each in enumerate(request.inputs):
        if each.name in tensors:
            raise InvalidRequestError(f"{each.name}: found twice among the inputs", each.name)
        if each.datatype not in DATATYPES:
            found = f"{each.name}: datatype: found {each.datatype!r}"
            raise InvalidRequestError(f"{found}, allowed are {', '.join(DATATYPES)}", each.name)
        for name in each.parameters:
            raise InvalidRequestError(f"{each.name}: parameter {name}: not supported", each.name)
        if raw and each.HasField("contents"):
            raise InvalidRequestError(
                f"{each.name}: found both contents and raw_input_contents, allowed is one", each.name
            )
        values = raw_values(each.name, each.datatype, raw[index]) if raw else contents_values(each)
        if any(size < 0 for size in each.shape) or math.prod(each.shape) != len(values):
            shape = f"{each.name}: shape: found {list(each.shape)}"
            raise InvalidRequestError(f"{shape}, but {len(values)} elements of {each.datatype}", each.name)
        if each.datatype == BYTES:
            values = [text_of(each.name, value) for value in values]
        tensors[each.name] = Tensor(each.name, each.datatype, tuple(each.shape), values)
    return tensors


def contents_values(tensor: pb.ModelInferRequest.InferInputTensor) -> list[Any]:
    field = DATATYPES[tensor.datatype][0]
    for other, _ in tensor.contents.ListFields():
        if other.name != field:
            raise InvalidRequestError(
                f"{tensor.name}: contents: found {other.name}, a {tensor.datatype} tensor has {field}", tensor.name
            )
    return list(getattr(tensor.contents, field))


def raw_values(name: str, datatype: str, data: bytes) -> list[Any]:
    if datatype == BYTES:
        return raw_strings(name, data)
    element = np.dtype(DATATYPES[datatype][1])
    if len(data) % element.itemsize:
        raise InvalidRequestError(
            f"{name}: raw_input_contents: found {len(data)} bytes, no whole number of {datatype}", name
        )
    values: list[Any] = np.frombuffer(data, element).tolist()
    return values


def raw_strings(name: str, data: bytes) -> list[bytes]:
    """Each after its length in four little-endian bytes."""
    strings = []
    position = 0
    while position < len(data):
        start = position + 4
        length = int.from_bytes(data[position:start], "little")
        position = start + length
        if position > len(data):
            raise InvalidRequestError(
                f"{name}: raw_input_contents: ends within an element; a BYTES element follows its length in 4 bytes",
                name,
            )
        strings.append(data[start:position])
    return strings


def text_of(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{name}: not valid UTF-8: {error.reason} at byte {error.start}", name) from None


def parameter_value(name: str, parameter: pb.InferParameter) -> Any:
    """Raises InvalidRequestError for a parameter without a value."""
    kind = parameter.WhichOneof("parameter_choice")
    if kind is None:
        raise InvalidRequestError(f"{name}: found a parameter without a value", name)
    return getattr(parameter, kind)


def add_output(
    response: pb.ModelInferResponse, name: str, shape: Sequence[int], texts: Sequence[str], raw: bool
) -> None:
    """A BYTES tensor, in the raw form or not; a response has one form alone."""
    data = [text.encode() for text in texts]
    output = response.outputs.add(name=name, datatype=BYTES, shape=shape)
    if raw:
        response.raw_output_contents.append(b"".join(struct.pack("<I", len(each)) + each for each in data))
    else:
        output.contents.bytes_contents.extend(data)
