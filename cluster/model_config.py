"""One model's entry in the configuration: where it comes from, what runs it, and how many requests it holds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ByteSize, Field, field_validator, model_validator

from cluster.artifacts.manifest import Quantization, Record
from cluster.families import EngineName, FamilyName
from cluster.machine.isa import Isa
from cluster.nodes_config import NodesConfig

# What clients ask for; as a repository's name on the Hub it may have one slash.
NAME_PART = "[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
ModelName = Annotated[str, Field(pattern=f"^{NAME_PART}(/{NAME_PART})?$")]

ROUTER_NAME = "router"  # its deployment, in the application of nibble's name
ROUTER_APP = "nibble"
# Seconds. Serve counts a request for up to 25 s after its end, and would start the replica again that has just ended.
LEAST_TO_ZERO_S = 30.0
# More at once hardly raise the tokens/s where prompts are long, and each waits for the others (docs/scaling.md).
TARGET_ONGOING = 4.0

# What users say, and the ggml type that it means.
QuantizationName = Literal["int4", "int8"]
QUANTIZATIONS: dict[QuantizationName, Quantization] = {"int4": "q4_0", "int8": "q8_0"}


class ReplicasConfig(Record):
    """There are from `min` to `max` replicas: as many as keep `target_ongoing_requests` requests on each (null: 4, or
    half of the queue's `max_ongoing` where that is less) and finish what waits within the time that a replica takes to
    start. `min` 0: a request starts the first one. `downscale_delay_s`: how long fewer must have been enough, before
    there are fewer. `downscale_to_zero_delay_s`: how long no request must have come, before the last one ends; null: as
    the other, but no less than 30."""

    min: Annotated[int, Field(ge=0)] = 1
    max: Annotated[int, Field(ge=1)] = 1
    target_ongoing_requests: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    downscale_delay_s: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 300
    downscale_to_zero_delay_s: Annotated[float, Field(ge=LEAST_TO_ZERO_S, allow_inf_nan=False)] | None = None

    @property
    def to_zero_delay_s(self) -> float:
        return self.downscale_to_zero_delay_s or max(self.downscale_delay_s, LEAST_TO_ZERO_S)

    @property
    def scales(self) -> bool:
        return self.min < self.max

    @model_validator(mode="after")
    def possible(self) -> ReplicasConfig:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, max is {self.max}; min must be at most max")
        if self.min and self.downscale_to_zero_delay_s is not None:
            raise ValueError(
                f"downscale_to_zero_delay_s: found {self.downscale_to_zero_delay_s:g}, but min is {self.min}: it never"
                " goes to zero; remove it, or let min be 0"
            )
        return self


class QueueConfig(Record):
    """A replica holds at most `max_ongoing` requests, each router `max_queued` more, of `max_queued_tokens` estimated
    tokens in all; the next one is refused. `max_ongoing` null: what the engine is good for, 4 with bigdl, which
    computes one after the other, and 32 with openvino, which computes them together. `max_queued_tokens` null: half of
    what `max_queued` requests take that fill the context."""

    max_ongoing: Annotated[int, Field(ge=1)] | None = None
    max_queued: Annotated[int, Field(ge=1)] = 64
    max_queued_tokens: Annotated[int, Field(ge=1)] | None = None


ToolParser = Literal["hermes", "llama3_json", "mistral", "pythonic"]

Tune = Literal["throughput", "latency", "precision"]


class DraftConfig(Record):
    """A small model with the tokenizer of the one that it guesses for, `tokens` tokens at a time. `checkpoint` is given
    as that of a model, and quantized like it; `family` null: the same as the model's."""

    checkpoint: Annotated[str, Field(min_length=1)]
    family: FamilyName | None = None
    tokens: Annotated[int, Field(ge=1, le=32)] = 4


class OpenvinoConfig(Record):
    """Of models with `engine: openvino`. `tune`: what its settings for this node's CPU are chosen for: the tokens per
    second of many sequences, or of one, or the precision of logits. `kv_cache`: bytes of a replica's cache; null is
    room for `queue.max_ongoing` sequences of `context` tokens, at most a replica's share, by its threads, of a quarter
    of the node's free memory. `step_tokens`: computed together, at most; a longer prompt is cut, so that the others'
    next tokens need not wait for all of it. `prompt_lookup`: how many tokens to guess at a time from the text so far;
    0 is off. `draft`: guesses with a smaller model instead."""

    tune: Tune = "throughput"
    kv_cache: Annotated[ByteSize, Field(gt=0)] | None = None
    # A matrix product of 65 rows takes OpenVINO as long as one of 128.
    step_tokens: Annotated[int, Field(ge=1)] = 64
    prompt_lookup: Annotated[int, Field(ge=0, le=32)] = 0
    draft: DraftConfig | None = None

    @model_validator(mode="after")
    def one_way_to_guess(self) -> OpenvinoConfig:
        if self.prompt_lookup and self.draft:
            raise ValueError("prompt_lookup and draft are both set; keep one of them: tokens are guessed in one way")
        return self


MAX_ONGOING: dict[EngineName, int] = {"bigdl": 4, "openvino": 32}


def deployment_name(model: str) -> str:
    """Serve names log files after deployments: they have no slash."""
    return model.replace("/", "--")


class ModelConfig(Record):
    """One served model. `aliases`: further names for it. `checkpoint`: builtin:FAMILY, a folder, or a Hub repository
    org/repo[@revision]. `threads`: of each replica, fixed, and the CPUs it reserves. `context`: tokens, prompt and
    completion together. `isa`: the instruction set of the native library; without it each node takes the fastest it can
    run. `nodes`: where its replicas may run; null: wherever there is room. `tool_parser`: the form in which the model
    calls tools; null: as its chat template tells."""

    name: ModelName
    aliases: tuple[ModelName, ...] = ()
    family: FamilyName
    checkpoint: Annotated[str, Field(min_length=1)]
    engine: EngineName = "bigdl"
    quantization: QuantizationName = "int4"
    isa: Isa | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] = 2
    context: Annotated[int, Field(ge=8, le=1 << 20)] = 512
    replicas: ReplicasConfig = ReplicasConfig()
    queue: QueueConfig = QueueConfig()
    openvino: OpenvinoConfig | None = None
    nodes: NodesConfig | None = None
    tool_parser: ToolParser | None = None

    @property
    def deployment(self) -> str:
        """The name of its Serve deployment."""
        return deployment_name(self.name)

    @property
    def max_ongoing(self) -> int:
        """Requests that a replica holds."""
        return self.queue.max_ongoing or MAX_ONGOING[self.engine]

    @property
    def max_queued_tokens(self) -> int:
        """Estimated tokens of the requests that wait in a router."""
        return self.queue.max_queued_tokens or self.queue.max_queued * self.context // 2

    @property
    def target_ongoing_requests(self) -> float:
        return self.replicas.target_ongoing_requests or min(TARGET_ONGOING, self.max_ongoing / 2)

    @property
    def ggml_type(self) -> Quantization:
        return QUANTIZATIONS[self.quantization]

    @field_validator("name")
    @classmethod
    def not_the_router(cls, value: str) -> str:
        if value == ROUTER_NAME:
            raise ValueError(f"{ROUTER_NAME!r} is the name of nibble's own ingress deployment")
        return value

    @model_validator(mode="after")
    def can_scale(self) -> ModelConfig:
        target, most = self.target_ongoing_requests, self.max_ongoing
        if self.replicas.scales and target >= most:
            allowed = f"allowed is less than the {most} that a replica holds (queue.max_ongoing), or it never scales"
            raise ValueError(f"replicas.target_ongoing_requests: found {target:g}, {allowed}")
        return self

    @model_validator(mode="after")
    def options_of_the_engine(self) -> ModelConfig:
        """What the engine would ignore is refused."""
        if self.openvino is not None and self.engine != "openvino":
            raise ValueError(f"openvino: options of engine openvino, but engine is {self.engine}; remove one of them")
        if self.isa is not None and self.engine != "bigdl":
            raise ValueError(f"isa: chooses a build of engine bigdl's library, but engine is {self.engine}; remove isa")
        return self
