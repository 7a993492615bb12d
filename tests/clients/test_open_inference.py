"""Clients of the Open Inference Protocol whose protobuf messages have the names of nibble's own, so that they need a
process of theirs: Triton's over gRPC, KServe's SDK over both. What they ask is in tests/clients/scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.clients.tool_environment import HERE, python_tool, run_script
from tests.integration.processes import Served

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]  # the first run installs them


def ask(folder: Path, script: str, *addresses: str) -> dict[str, Any]:
    return run_script([python_tool("open_inference") / "python", HERE / "scripts" / script, *addresses], folder)


def test_triton_s_grpc_client(served: Served, tmp_path: Path) -> None:
    found = ask(tmp_path, "triton_grpc.py", served.grpc)
    assert found["live"]
    assert found["models_ready"] == [True, False]
    assert found["server"]["name"] == "nibble"
    assert found["metadata"]["inputs"] == [{"name": "text_input", "datatype": "BYTES", "shape": ["-1"]}]
    config = found["config"]
    assert config["input"] == [{"name": "text_input", "data_type": "TYPE_STRING", "dims": ["-1"]}]
    assert config["parameters"]["family"] == {"string_value": "llama"}
    assert config["model_transaction_policy"] == {"decoupled": True}
    states = {each["name"]: each["state"] for each in found["index"]}
    assert states["llama"] == "READY"
    assert found["everyone"] == list(states)
    assert "CPU" in found["texts"][0]
    assert len(found["texts"]) == 2
    assert found["streamed"] == found["texts"][0]
    before, after = ({**each["inference_stats"], **each} for each in found["statistics"])
    assert count(after, "inference_count") - count(before, "inference_count") >= 3
    assert count(after["success"], "count") - count(before["success"], "count") >= 2
    assert count(after["success"], "ns") > count(before["success"], "ns")
    status, message = found["refused"]
    assert status == "StatusCode.NOT_FOUND"
    assert "served are" in message


def count(message: dict[str, Any], field: str) -> int:
    """Of protobuf's JSON, where large numbers are texts and 0 is left out."""
    return int(message.get(field, 0))


def test_kserve_s_sdk_over_rest_and_grpc(served: Served, tmp_path: Path) -> None:
    found = ask(tmp_path, "kserve_sdk.py", served.http, served.grpc)
    for api in ("rest", "grpc"):
        assert found[api]["live"], api
        assert found[api]["models_ready"] == [True, False], api
        assert "CPU" in found[api]["text"], api
    assert found["rest"]["text"] == found["grpc"]["text"]
