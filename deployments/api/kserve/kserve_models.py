"""What clients of the Open Inference Protocol are told of the server and its models: metadata, and Triton's
configuration, statistics and index. All are messages, for gRPC and REST alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version

from prometheus_client.core import Metric

from cluster.errors import InvalidRequestError, ModelNotFoundError
from deployments.api.kserve.kserve_tensors import BYTES
from deployments.api.operations import Operations
from deployments.observability.metrics import ABORTED
from deployments.routing.router import ModelCard
from protos import open_inference_pb2 as pb

MODEL_VERSION = "1"
TEXT_INPUTS = ("text_input", "prompt")
OUTPUTS = ("text_output", "finish_reason")
EXTENSIONS = ("parameters", "model_configuration", "statistics")
ANY_SIZE = -1

# Samples of `GET /metrics` that the statistics are made of.
SUCCEEDED = "vllm:e2e_request_latency_seconds_count"
SUCCEEDED_S = "vllm:e2e_request_latency_seconds_sum"
FAILED = "nibble_refused_total"
COMPLETIONS = "vllm:request_success_total"
STEPS = "nibble_replica_steps_total"


def check_version(found: str, field: str) -> None:
    if found not in ("", MODEL_VERSION):
        raise InvalidRequestError(f"{field}: found {found!r}, allowed are the empty one and {MODEL_VERSION!r}", field)


def server_metadata() -> pb.ServerMetadataResponse:
    return pb.ServerMetadataResponse(name="nibble", version=version("nibble-serve"), extensions=EXTENSIONS)


def model_ready(operations: Operations, name: str) -> bool:
    """A model that is not there is not ready: clients ask until one is."""
    try:
        return operations.model(name).ready
    except ModelNotFoundError:
        return False


def model_metadata(operations: Operations, name: str, found_version: str) -> pb.ModelMetadataResponse:
    card = card_of(operations, name, found_version)
    tensor = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name=card.id,
        versions=[MODEL_VERSION],
        platform=platform(card),
        inputs=[tensor(name=TEXT_INPUTS[0], datatype=BYTES, shape=[ANY_SIZE])],
        outputs=[tensor(name=name, datatype=BYTES, shape=[ANY_SIZE]) for name in OUTPUTS],
    )


def model_config(operations: Operations, name: str, found_version: str) -> pb.ModelConfig:
    card = card_of(operations, name, found_version)
    about = {"family": card.family, "engine": card.engine, "quantization": card.quantization, "context": card.context}
    return pb.ModelConfig(
        name=card.id,
        platform=platform(card),
        backend="nibble",
        input=[pb.ModelInput(name=TEXT_INPUTS[0], data_type=pb.TYPE_STRING, dims=[ANY_SIZE])],
        output=[pb.ModelOutput(name=name, data_type=pb.TYPE_STRING, dims=[ANY_SIZE]) for name in OUTPUTS],
        parameters={key: pb.ModelParameter(string_value=str(value)) for key, value in about.items()},
        model_transaction_policy=pb.ModelTransactionPolicy(decoupled=True),
    )


async def model_statistics(operations: Operations, name: str, found_version: str) -> pb.ModelStatisticsResponse:
    """Of the model with this name or alias; of all where it is empty."""
    if name:
        roots = [card_of(operations, name, found_version).root]
    else:
        check_version(found_version, "version")
        roots = [card.root for card in own_cards(operations)]
    counts = counts_of(await operations.metrics())
    return pb.ModelStatisticsResponse(
        model_stats=[
            pb.ModelStatistics(
                name=name or root,
                version=MODEL_VERSION,
                inference_count=int(counts[COMPLETIONS, root]),
                execution_count=int(counts[STEPS, root]),
                inference_stats=pb.InferStatistics(
                    success=pb.StatisticDuration(
                        count=int(counts[SUCCEEDED, root]), ns=round(counts[SUCCEEDED_S, root] * 1e9)
                    ),
                    fail=pb.StatisticDuration(count=int(counts[FAILED, root])),
                ),
            )
            for root in roots
        ]
    )


def counts_of(metrics: Iterable[Metric]) -> Counter[tuple[str, str]]:
    """The samples of all routers and replicas together, by name and model; without completions whose client left."""
    counts: Counter[tuple[str, str]] = Counter()
    for metric in metrics:
        for sample in metric.samples:
            if sample.labels.get("finished_reason") != ABORTED:
                counts[sample.name, sample.labels.get("model_name", "")] += sample.value  # type: ignore[assignment]
    return counts


def repository_index(operations: Operations, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
    if request.repository_name:
        raise InvalidRequestError(
            f"repository_name: found {request.repository_name!r:.80}, allowed is the empty one: there is one"
            " repository, the configuration",
            "repository_name",
        )
    index = pb.RepositoryIndexResponse.ModelIndex
    return pb.RepositoryIndexResponse(
        models=[
            index(
                name=card.id,
                version=MODEL_VERSION,
                state="READY" if card.ready else "UNAVAILABLE",
                reason="" if card.ready else "no replica runs",
            )
            for card in own_cards(operations)
            if card.ready or not request.ready
        ]
    )


def card_of(operations: Operations, name: str, found_version: str) -> ModelCard:
    """Raises InvalidRequestError for another version, ModelNotFoundError."""
    check_version(found_version, "version")
    return operations.model(name)


def own_cards(operations: Operations) -> list[ModelCard]:
    """By the models' own names."""
    return [card for card in operations.models() if card.id == card.root]


def platform(card: ModelCard) -> str:
    return f"nibble_{card.engine}"
