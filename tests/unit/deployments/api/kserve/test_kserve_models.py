"""Triton's ModelConfig, ModelStatistics and RepositoryIndex, over gRPC and REST."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import MessageToDict
from prometheus_client.core import CounterMetricFamily, Metric
from starlette.testclient import TestClient

from cluster.config import AuthConfig
from cluster.errors import UnavailableError
from deployments.api.kserve.kserve_api import KserveApi
from protos import open_inference_pb2 as pb
from tests.unit.deployments.api.kserve.test_kserve_http import infer_body
from tests.unit.fakes import EchoModel
from tests.unit.grpc_fakes import Context, api_of

# As Triton's grpc_service.proto and model_config.proto number them.
NUMBERS = {
    "ModelConfigRequest": {"name": 1, "version": 2},
    "ModelConfigResponse": {"config": 1},
    "ModelConfig": {
        "name": 1, "platform": 2, "max_batch_size": 4, "input": 5, "output": 6, "parameters": 14, "backend": 17,
        "model_transaction_policy": 19,
    },
    "ModelInput": {"name": 1, "data_type": 2, "dims": 4},
    "ModelOutput": {"name": 1, "data_type": 2, "dims": 3},
    "ModelTransactionPolicy": {"decoupled": 1},
    "ModelParameter": {"string_value": 1},
    "ModelStatisticsRequest": {"name": 1, "version": 2},
    "ModelStatisticsResponse": {"model_stats": 1},
    "ModelStatistics": {"name": 1, "version": 2, "inference_count": 4, "execution_count": 5, "inference_stats": 6},
    "InferStatistics": {"success": 1, "fail": 2},
    "StatisticDuration": {"count": 1, "ns": 2},
    "RepositoryIndexRequest": {"repository_name": 1, "ready": 2},
    "RepositoryIndexResponse": {"models": 1},
    "RepositoryIndexResponse.ModelIndex": {"name": 1, "version": 2, "state": 3, "reason": 4},
}  # fmt: skip

CONFIG = {
    "name": "echo",
    "platform": "nibble_bigdl",
    "max_batch_size": 0,
    "input": [{"name": "text_input", "data_type": "TYPE_STRING", "dims": [-1]}],
    "output": [
        {"name": "text_output", "data_type": "TYPE_STRING", "dims": [-1]},
        {"name": "finish_reason", "data_type": "TYPE_STRING", "dims": [-1]},
    ],
    "parameters": {
        "context": {"string_value": "512"},
        "engine": {"string_value": "bigdl"},
        "family": {"string_value": "llama"},
        "quantization": {"string_value": "q4_0"},
    },
    "backend": "nibble",
    "model_transaction_policy": {"decoupled": True},
}
READY = {"name": "echo", "version": "1", "state": "READY", "reason": ""}
ABSENT = {"name": "absent", "version": "1", "state": "UNAVAILABLE", "reason": "no replica runs"}


@pytest.fixture
def api(model: EchoModel) -> KserveApi:
    return api_of(model)


def test_field_numbers_are_those_that_triton_s_clients_read() -> None:
    for name, numbers in NUMBERS.items():
        message: Any = pb
        for part in name.split("."):
            message = getattr(message, part)
        assert {field.name: field.number for field in message.DESCRIPTOR.fields} == numbers, name
    assert pb.TYPE_STRING == 13


async def test_a_model_s_configuration(api: KserveApi) -> None:
    response = await api.ModelConfig(pb.ModelConfigRequest(name="echo", version="1"), Context())
    config = response.config
    assert [(each.name, each.data_type, list(each.dims)) for each in config.input] == [("text_input", 13, [-1])]
    assert [each.name for each in config.output] == ["text_output", "finish_reason"]
    assert config.parameters["family"].string_value == "llama"
    assert config.model_transaction_policy.decoupled


def test_a_model_s_configuration_as_json(client: TestClient) -> None:
    for path in ("/v2/models/echo/config", "/v2/models/echo/versions/1/config"):
        assert client.get(path).json() == CONFIG
    assert client.get("/v2/models/gpt/config").status_code == 404


async def test_the_index_has_each_model_once(api: KserveApi) -> None:
    response = await api.RepositoryIndex(pb.RepositoryIndexRequest(), Context())
    assert [MessageToDict(each) | {"reason": each.reason} for each in response.models] == [READY, ABSENT]
    response = await api.RepositoryIndex(pb.RepositoryIndexRequest(ready=True), Context())
    assert [each.name for each in response.models] == ["echo"]
    context = Context()
    await api.RepositoryIndex(pb.RepositoryIndexRequest(repository_name="s3"), context)
    assert context.code == grpc.StatusCode.INVALID_ARGUMENT
    assert context.details.startswith("repository_name: found 's3', allowed is the empty one")


def test_the_index_as_json(client: TestClient) -> None:
    assert client.post("/v2/repository/index").json() == [READY, ABSENT]
    assert client.post("/v2/repository/index", json={"ready": True}).json() == [READY]
    for body, field in (({"ready": 1}, "ready"), ({"name": "a"}, "name")):
        answer = client.post("/v2/repository/index", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"].startswith(f"{field}: ")


async def steps() -> list[Metric]:
    """Of two replicas, as a scrape has them."""
    family = CounterMetricFamily("nibble_replica_steps", "", labels=("model_name", "replica"))
    family.add_metric(("echo", "a"), 3)
    family.add_metric(("echo", "b"), 4)
    family.add_metric(("absent", "c"), 5)
    return [family]


async def test_statistics_count_what_was_asked(api: KserveApi, model: EchoModel) -> None:
    request = pb.ModelInferRequest(model_name="echo")
    request.inputs.add(name="text_input", datatype="BYTES", shape=[2]).contents.bytes_contents.extend([b"a", b"b"])
    await api.ModelInfer(request, Context())
    model.error = UnavailableError("gone")
    await api.ModelInfer(request, Context())
    api.operations.metrics_elsewhere = steps
    response = await api.ModelStatistics(pb.ModelStatisticsRequest(name="echo"), Context())
    (statistics,) = response.model_stats
    assert (statistics.name, statistics.version) == ("echo", "1")
    assert (statistics.inference_count, statistics.execution_count) == (2, 7)
    assert (statistics.inference_stats.success.count, statistics.inference_stats.fail.count) == (1, 1)
    assert statistics.inference_stats.success.ns > 0
    response = await api.ModelStatistics(pb.ModelStatisticsRequest(), Context())
    assert [(each.name, each.execution_count) for each in response.model_stats] == [("echo", 7), ("absent", 5)]
    context = Context()
    await api.ModelStatistics(pb.ModelStatisticsRequest(name="gpt"), context)
    assert context.code == grpc.StatusCode.NOT_FOUND


async def test_a_client_that_left_is_no_inference(api: KserveApi, model: EchoModel) -> None:
    model.delay_s = 60
    request = pb.ModelInferRequest(model_name="echo")
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"a")
    infer = asyncio.ensure_future(api.ModelInfer(request, Context()))
    while not model.requests:
        await asyncio.sleep(0)
    infer.cancel()
    await asyncio.gather(infer, return_exceptions=True)
    response = await api.ModelStatistics(pb.ModelStatisticsRequest(name="echo"), Context())
    assert response.model_stats[0].inference_count == 0


def test_statistics_as_json(client: TestClient) -> None:
    client.post("/v2/models/echo/infer", json=infer_body("a"))
    for path in ("/v2/models/echo/stats", "/v2/models/echo/versions/1/stats"):
        (statistics,) = client.get(path).json()["model_stats"]
        assert (statistics["name"], statistics["inference_count"]) == ("echo", 1)
        assert statistics["inference_stats"]["success"]["count"] == 1
    assert [each["name"] for each in client.get("/v2/models/stats").json()["model_stats"]] == ["echo", "absent"]


@pytest.mark.parametrize("method", ["ModelConfig", "ModelStatistics", "RepositoryIndex"])
async def test_a_key_is_wanted(model: EchoModel, tmp_path: Path, method: str) -> None:
    file, context = tmp_path / "keys.yaml", Context()
    file.write_text(f"- {{name: alice, sha256: {hashlib.sha256(b'secret').hexdigest()}}}\n")
    api = api_of(model, AuthConfig(api_keys_file=file))
    await getattr(api, method)(getattr(pb, f"{method}Request")(), context)
    assert context.code == grpc.StatusCode.UNAUTHENTICATED
