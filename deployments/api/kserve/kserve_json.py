"""The Open Inference Protocol's JSON to the messages of `protos/open_inference.proto`, and back."""

from __future__ import annotations

import json
from typing import Any

from google.protobuf.message import Message

from cluster.errors import InvalidRequestError
from deployments.api.kserve.kserve_models import TEXT_INPUTS
from deployments.api.kserve.kserve_tensors import BYTES, DATATYPES
from protos import open_inference_pb2 as pb

FIELDS_OF_REQUEST = ("id", "parameters", "inputs", "outputs")
FIELDS_OF_TENSOR = ("name", "shape", "datatype", "parameters", "data")
TEXT = TEXT_INPUTS[0]
# How much of the body is JSON; the tensors' binary data is behind it.
JSON_LENGTH = "Inference-Header-Content-Length"
BINARY_SIZE = "binary_data_size"
# Triton's clients ask for binary outputs unless told otherwise, and read JSON where there are none.
BINARY_OUTPUT = ("binary_data", "binary_data_output")


def infer_request(body: dict[str, Any], model: str, model_version: str, binary: bytes = b"") -> pb.ModelInferRequest:
    """`binary`: the tensors' data, one behind the other. Raises InvalidRequestError, naming the field, for what the
    message has no place for."""
    body, model_version = without_model(body, model, model_version)
    known(body, FIELDS_OF_REQUEST, "")
    message = pb.ModelInferRequest(model_name=model, model_version=model_version, id=text(body.get("id", ""), "id"))
    put_fields(message, body.get("parameters"), "parameters")
    for index, tensor in enumerate(objects(body.get("inputs"), "inputs")):
        binary = add_input(message, tensor, f"inputs[{index}]", binary)
    if binary:
        raise InvalidRequestError(f"body: found {len(binary)} bytes behind the data of the inputs; leave them out")
    for index, output in enumerate(objects(body.get("outputs"), "outputs")):
        where = f"outputs[{index}]"
        known(output, ("name", "parameters"), f"{where}.")
        added = message.outputs.add(name=text(output.get("name"), f"{where}.name"))
        asked = objects([output.get("parameters") or {}], f"{where}.parameters")[0]
        put_parameters(added.parameters, {name: asked[name] for name in asked if name not in BINARY_OUTPUT})
    return message


def without_model(body: dict[str, Any], model: str, model_version: str) -> tuple[dict[str, Any], str]:
    """A copy without nulls and without the model's name and version, which KServe's SDK repeats in the body; and the
    version. Raises InvalidRequestError where the path has another one."""
    rest = {name: value for name, value in body.items() if value is not None}
    named = text(rest.pop("model_name", model), "model_name")
    version = text(rest.pop("model_version", model_version), "model_version")
    for field, found, allowed in (("model_name", named, model), ("model_version", version, model_version or version)):
        if found != allowed:
            raise InvalidRequestError(f"{field}: found {found!r:.80}, the path has {allowed!r:.80}", field)
    return rest, version


def add_input(message: pb.ModelInferRequest, tensor: dict[str, Any], where: str, binary: bytes) -> bytes:
    """What is left of the binary data."""
    known(tensor, FIELDS_OF_TENSOR, f"{where}.")
    datatype = text(tensor.get("datatype"), f"{where}.datatype")
    shape, data = tensor.get("shape"), tensor.get("data")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 1 << 31 for size in shape):
        raise InvalidRequestError(f"{where}.shape: found {shape!r:.100}, allowed is a list of sizes", f"{where}.shape")
    if datatype not in DATATYPES:
        raise InvalidRequestError(
            f"{where}.datatype: found {datatype!r:.40}, allowed are {', '.join(DATATYPES)}", f"{where}.datatype"
        )
    added = message.inputs.add(name=text(tensor.get("name"), f"{where}.name"), datatype=datatype, shape=shape)
    parameters = dict(objects([tensor.get("parameters") or {}], f"{where}.parameters")[0])
    size = parameters.pop(BINARY_SIZE, None)
    put_parameters(added.parameters, parameters)
    if size is not None:
        if type(size) is not int or not 0 <= size <= len(binary) or data is not None:
            field = f"{where}.parameters.{BINARY_SIZE}"
            raise InvalidRequestError(
                f"{field}: found {size!r:.40}, allowed are 0 to {len(binary)}, the bytes that are left behind the"
                f" JSON ({JSON_LENGTH}), and no data beside it",
                field,
            )
        message.raw_input_contents.append(binary[:size])
        return binary[size:]
    values = flat(data, f"{where}.data")
    try:
        if datatype == BYTES:
            values = [text(value, f"{where}.data").encode() for value in values]
        getattr(added.contents, DATATYPES[datatype][0]).extend(values)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"{where}.data: not of {datatype}: {error}", f"{where}.data") from None
    return binary


def generate_request(body: dict[str, Any], model: str, model_version: str) -> pb.ModelInferRequest:
    """`text_input`, and fields beside it or in `parameters`."""
    fields, model_version = without_model(body, model, model_version)
    prompt = fields.pop(TEXT, None)
    message = pb.ModelInferRequest(model_name=model, model_version=model_version)
    message.id = text(fields.pop("id", ""), "id")
    put_fields(message, fields.pop("parameters", None), "parameters")
    put_fields(message, fields, "body")
    added = message.inputs.add(name=TEXT, datatype=BYTES, shape=[1])
    added.contents.bytes_contents.append(text(prompt, TEXT).encode())
    return message


def put_fields(message: pb.ModelInferRequest, values: Any, where: str) -> None:
    """Of an object; a parameter holds no list and no object, so that a list of texts becomes a tensor, and an object
    its JSON, which is read again."""
    (fields,) = objects([values or {}], where)
    for name, value in fields.items():
        text(name, where)
        if name in message.parameters or any(name == tensor.name for tensor in message.inputs):
            raise InvalidRequestError(f"{name}: given twice", name)
        if isinstance(value, list):
            added = message.inputs.add(name=name, datatype=BYTES, shape=[len(value)])
            added.contents.bytes_contents.extend(text(each, name).encode() for each in value)
        elif name not in BINARY_OUTPUT:
            put_parameters(message.parameters, {name: json.dumps(value) if isinstance(value, dict) else value})


def put_parameters(parameters: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, dict | list):
            raise InvalidRequestError(f"{name}: found {value!r:.100}, allowed is a single value", name)
        if isinstance(value, str):
            text(value, name)
        kind = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
        try:
            setattr(parameters[name], kind, value)
        except ValueError as error:
            raise InvalidRequestError(f"{name}: found {value!r:.100}: {error}", name) from None


def objects(values: Any, where: str) -> list[dict[str, Any]]:
    found = [] if values is None else values
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise InvalidRequestError(f"{where}: found {values!r:.100}, allowed is a list of objects", where)
    return found


def known(values: dict[str, Any], names: tuple[str, ...], where: str) -> None:
    for name in values:
        if name not in names:
            raise InvalidRequestError(f"{where}{name}: not supported; allowed are {', '.join(names)}", f"{where}{name}")


def text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(f"{where}: found {value!r:.100}, allowed is a text", where)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError(f"{where}: found half a surrogate pair, allowed is valid Unicode", where) from None
    return value


def flat(data: Any, where: str) -> list[Any]:
    """Row-major, of nested lists or of one list."""
    if not isinstance(data, list):
        raise InvalidRequestError(f"{where}: found {data!r:.100}, allowed is a list", where)
    values: list[Any] = []
    rest = [data]
    while rest:
        each = rest.pop()
        if isinstance(each, list):
            rest.extend(reversed(each))
        else:
            values.append(each)
    return values


def response_object(response: pb.ModelInferResponse) -> dict[str, Any]:
    outputs = [
        {
            "name": each.name,
            "datatype": each.datatype,
            "shape": list(each.shape),
            "data": [value.decode() for value in each.contents.bytes_contents],
        }
        for each in response.outputs
    ]
    parameters = {name: each.int64_param for name, each in sorted(response.parameters.items())}
    named = {"model_name": response.model_name, "model_version": response.model_version, "id": response.id}
    return {**named, "outputs": outputs, "parameters": parameters}


def message_object(message: Message) -> dict[str, Any]:
    """All fields by their names; numbers stay numbers, which protobuf's own JSON makes texts of."""
    return {field.name: field_value(field, getattr(message, field.name)) for field in message.DESCRIPTOR.fields}


def field_value(field: Any, value: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return {key: message_object(each) for key, each in sorted(value.items())}
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    if field.message_type is None:
        return list(value) if field.is_repeated else value
    return [message_object(each) for each in value] if field.is_repeated else message_object(value)
