from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InvalidRequestError
from deployments.api.kserve.kserve_tensors import DATATYPES, add_output, input_tensors, raw_strings
from protos import open_inference_pb2 as pb


@given(texts=st.lists(st.text(), min_size=1), raw=st.booleans())
def test_bytes_tensors_come_through_both_ways(texts: list[str], raw: bool) -> None:
    response = pb.ModelInferResponse()
    add_output(response, "text_output", [len(texts)], texts, raw)
    (output,) = response.outputs
    request = pb.ModelInferRequest(raw_input_contents=response.raw_output_contents)
    tensor = request.inputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
    if not raw:
        tensor.contents.CopyFrom(output.contents)
    assert input_tensors(request)["text_output"].values == texts


def packed(strings: Sequence[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(each)) + each for each in strings)


@given(strings=st.lists(st.binary(max_size=8), max_size=4), last=st.binary(max_size=8), data=st.data())
def test_a_raw_tensor_that_is_cut_short_is_refused(strings: list[bytes], last: bytes, data: st.DataObject) -> None:
    whole = packed([*strings, last])
    assert raw_strings("x", whole) == [*strings, last]
    cut = data.draw(st.integers(len(packed(strings)) + 1, len(whole) - 1))
    with pytest.raises(InvalidRequestError, match="ends within an element"):
        raw_strings("x", whole[:cut])


NUMBERS = {
    "BOOL": "?", "INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q", "UINT8": "B", "UINT16": "H", "UINT32": "I",
    "UINT64": "Q", "FP32": "f", "FP64": "d",
}  # fmt: skip


@pytest.mark.parametrize(("datatype", "code"), NUMBERS.items())
def test_numbers_are_the_same_in_both_forms(datatype: str, code: str) -> None:
    largest = 2 ** (8 * struct.calcsize(code) - (1 if code.islower() else 0)) - 1
    values: list[Any] = {"?": [True, False], "f": [0.5, 3.0], "d": [0.1, 3.0]}.get(code, [1, largest])
    plain, raw = pb.ModelInferRequest(), pb.ModelInferRequest(raw_input_contents=[struct.pack(f"<2{code}", *values)])
    for request in (plain, raw):
        request.inputs.add(name="x", datatype=datatype, shape=[2])
    getattr(plain.inputs[0].contents, DATATYPES[datatype][0]).extend(values)
    for request in (plain, raw):
        found = input_tensors(request)["x"].values
        assert found == values
        assert [type(value) for value in found] == [type(value) for value in values]
