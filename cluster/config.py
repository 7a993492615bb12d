"""The configuration: one YAML file for `nibble serve`, `serve deploy` and a RayService. All defaults are here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ByteSize, Field, ValidationError, field_validator, model_validator

from cluster.artifacts.manifest import SHARD_BYTES, Quantization, Record
from cluster.errors import ConfigError
from cluster.families import FAMILY_NAMES, EngineName, FamilyName
from cluster.isa import Isa

Port = Annotated[int, Field(ge=1, le=65535)]
# A model's name is a Serve deployment's name and a path segment of metrics.
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]

ROUTER_NAME = "router"

# What users say, and the ggml type that it means.
QuantizationName = Literal["int4", "int8"]
QUANTIZATIONS: dict[QuantizationName, Quantization] = {"int4": "q4_0", "int8": "q8_0"}


class HttpConfig(Record):
    host: str = "127.0.0.1"
    port: Port = 8000


class GrpcConfig(Record):
    port: Port = 9000


class ArtifactsConfig(Record):
    """`cache_dir`: each node's own cache of artifacts, one folder an artifact. `cache_size`: what they may take
    together (such as 50GB), with what engines derive from them; the least recently used go first; null is no bound.
    `durable_uri`: where artifacts are kept beyond the cluster's life, any fsspec URI (file://, s3://, gs://).
    `shard_size`: of a conversion task's output; a task needs at most four times as much memory as its shard has fp16
    weights."""

    cache_dir: Annotated[Path, Field(validate_default=True)] = Path("~/.cache/nibble")
    cache_size: Annotated[ByteSize, Field(gt=0)] | None = None
    durable_uri: Annotated[str, Field(min_length=1)] | None = None
    shard_size: Annotated[ByteSize, Field(ge=1, validate_default=True)] = ByteSize(SHARD_BYTES)

    @field_validator("cache_dir")
    @classmethod
    def expand_home(cls, value: Path) -> Path:
        return value.expanduser().absolute()


class AuthConfig(Record):
    """`api_keys_file`: whose keys requests must carry, a file of `nibble keys add` on the router's node; null admits
    everyone."""

    api_keys_file: Path | None = None

    @field_validator("api_keys_file", mode="before")
    @classmethod
    def not_empty(cls, value: Any) -> Any:
        # The empty path is the folder one stands in: a key file left out by mistake, which must not pass as none.
        if value == "":
            raise ValueError("is empty; name a file, or give null to admit everyone")
        return value

    @field_validator("api_keys_file")
    @classmethod
    def expand_home(cls, value: Path | None) -> Path | None:
        return value and value.expanduser().absolute()


class LimitsConfig(Record):
    """What one request may ask for; null is no bound but the model's own. `body_bytes`: of an HTTP body or a gRPC
    message. `choices`: sequences, prompts times n or best_of. `timeout_s`: its longest time. `keep_alive_s`: between
    comments in a stream of server-sent events that waits."""

    body_bytes: Annotated[ByteSize, Field(ge=1, validate_default=True)] = ByteSize(1 << 20)
    prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    choices: Annotated[int, Field(ge=1)] = 32
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 600
    keep_alive_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10


class LoggingConfig(Record):
    """`prompts`: whether the request log holds prompts and completions."""

    prompts: bool = False


class ReplicasConfig(Record):
    """Serve adds replicas, from `min` to `max`, to keep `target_ongoing_requests` requests on each; null: half of the
    queue's `max_ongoing`."""

    min: Annotated[int, Field(ge=1)] = 1
    max: Annotated[int, Field(ge=1)] = 1
    target_ongoing_requests: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def min_at_most_max(self) -> ReplicasConfig:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, max is {self.max}; min must be at most max")
        return self


class QueueConfig(Record):
    """A replica holds at most `max_ongoing` requests, the router `max_queued` more for it; the next one is refused.
    `max_ongoing` null: what the engine is good for, 4 with bigdl, which computes one after the other, and 32 with
    openvino, which computes them together."""

    max_ongoing: Annotated[int, Field(ge=1)] | None = None
    max_queued: Annotated[int, Field(ge=1)] = 64


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


class ModelConfig(Record):
    """One served model. `checkpoint`: builtin:FAMILY, a folder, or a Hub repository org/repo[@revision]. `threads`: of
    each replica, fixed, and the CPUs it reserves. `context`: tokens, prompt and completion together. `isa`: the
    instruction set of the native library; without it each node takes the fastest it can run."""

    name: ModelName
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

    @property
    def max_ongoing(self) -> int:
        """Requests that a replica holds."""
        return self.queue.max_ongoing or MAX_ONGOING[self.engine]

    @property
    def target_ongoing_requests(self) -> float:
        return self.replicas.target_ongoing_requests or self.max_ongoing / 2

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
    def options_of_the_engine(self) -> ModelConfig:
        """What the engine would ignore is refused."""
        if self.openvino is not None and self.engine != "openvino":
            raise ValueError(f"openvino: options of engine openvino, but engine is {self.engine}; remove one of them")
        if self.isa is not None and self.engine != "bigdl":
            raise ValueError(f"isa: chooses a build of engine bigdl's library, but engine is {self.engine}; remove isa")
        return self


class NibbleConfig(Record):
    http: HttpConfig = HttpConfig()
    grpc: GrpcConfig = GrpcConfig()
    artifacts: ArtifactsConfig = ArtifactsConfig()
    auth: AuthConfig = AuthConfig()
    limits: LimitsConfig = LimitsConfig()
    logging: LoggingConfig = LoggingConfig()
    models: Annotated[tuple[ModelConfig, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def no_clash(self) -> NibbleConfig:
        names = [model.name for model in self.models]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"models: {', '.join(sorted(twice))} appears more than once; names must differ")
        if self.http.port == self.grpc.port:
            raise ValueError(f"http.port and grpc.port are both {self.http.port}; they must differ")
        return self

    @property
    def threads(self) -> int:
        """CPUs that the smallest number of replicas of all models needs."""
        return sum(model.threads * model.replicas.min for model in self.models)


def default_config() -> NibbleConfig:
    """The four built-in demo models, on one thread each: with two, models this small mostly wait for each other's
    threads (on 2 cores, tests/bench/demo_serving.py shows 3 to 5 times the tokens/s with one)."""
    models = (
        ModelConfig(name=family, family=family, checkpoint=f"builtin:{family}", threads=1) for family in FAMILY_NAMES
    )
    return NibbleConfig(models=tuple(models))


def parse_config(values: Any, source: str) -> NibbleConfig:
    """Raises ConfigError with one line for each wrong key: its dotted path, what was found and what is allowed."""
    try:
        return NibbleConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(describe_validation(error, source))) from None


def load_config(path: Path) -> NibbleConfig:
    """Reads a YAML file. Raises ConfigError where it cannot be read, is no YAML, or `parse_config` refuses it."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: found {type(values).__name__}, expected a mapping with the key models")
    return parse_config(values, str(path))


def describe_validation(error: ValidationError, source: str) -> list[str]:
    """One line for each error, naming its key: `nibble.yaml: models[0].threads: found 0, …`."""
    lines = []
    for detail in error.errors():
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"]).lstrip(".")
        where = f"{source}: {key}" if key else source
        if detail["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key; remove it or correct its name")
        elif detail["type"] == "missing":
            lines.append(f"{where}: missing, but required")
        elif detail["type"] == "value_error":
            lines.append(f"{where}: {detail['ctx']['error']}")
        else:
            lines.append(f"{where}: found {detail['input']!r}; {detail['msg'][0].lower()}{detail['msg'][1:]}")
    return lines
