"""The configuration: one YAML file for `nibble serve`, `serve deploy` and a RayService. All defaults are here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ByteSize, Field, ValidationError, field_validator, model_validator

from cluster.artifacts.manifest import SHARD_BYTES, Record
from cluster.errors import ConfigError
from cluster.families import FAMILY_NAMES
from cluster.machine.home import expanded
from cluster.model_config import ModelConfig
from cluster.nodes_config import NodesConfig

Port = Annotated[int, Field(ge=1, le=65535)]
DRAIN_S = 3600.0  # where neither limits.drain_s nor limits.timeout_s bounds it

# Of a web page, as a browser says it; * is any.
Origin = Annotated[str, Field(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/?#*\s]+)$")]


class HttpConfig(Record):
    """`cors_origins`: of web pages that may call the server from a browser, such as https://chat.example.org."""

    host: str = "127.0.0.1"
    port: Port = 8000
    cors_origins: tuple[Origin, ...] = ()


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
        return expanded(value, "artifacts.cache_dir").absolute()


def default_artifacts() -> ArtifactsConfig:
    """Made when it is needed, since it asks for the home folder. Where none is known, it is one that `NibbleConfig`
    refuses: pydantic makes it for comparisons, too."""
    try:
        return ArtifactsConfig()
    except ConfigError:
        return ArtifactsConfig.model_construct()


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
        return value and expanded(value, "auth.api_keys_file").absolute()


class LimitsConfig(Record):
    """What one request may ask for; null is no bound but the model's own. `body_bytes`: of an HTTP body or a gRPC
    message. `choices`: sequences, prompts times n or best_of. `embeddings`: inputs to embed. `timeout_s`: its longest
    time. `stall_s`: the longest time from one token to the next, after which its replica counts as frozen.
    `keep_alive_s`: between comments in a stream of server-sent events that waits. `drain_s`: how long what stops (a
    replica, a router, the server) waits for the requests in it; null: `timeout_s`, so that none is cut."""

    body_bytes: Annotated[ByteSize, Field(ge=1, validate_default=True)] = ByteSize(1 << 20)
    prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    choices: Annotated[int, Field(ge=1)] = 32
    embeddings: Annotated[int, Field(ge=1)] = 2048
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 600
    stall_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 60
    keep_alive_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10
    drain_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None

    @property
    def drain(self) -> float:
        """Seconds."""
        if self.drain_s is not None:
            return self.drain_s
        return DRAIN_S if self.timeout_s is None else self.timeout_s


class RouterConfig(Record):
    """`replicas`: of the router, which share the connections; each needs a part of a core, and no engine's threads.
    `nodes`: where they may run; null: anywhere."""

    replicas: Annotated[int, Field(ge=1, le=100)] = 1
    nodes: NodesConfig | None = None


class LoggingConfig(Record):
    """`prompts`: whether the request log holds prompts and completions."""

    prompts: bool = False


class ObservabilityConfig(Record):
    """`traces`: whether the router begins OpenTelemetry traces, and goes on with those of its clients. Where they are
    sent to, and which, is told by the variables OTEL_* of its environment and the replicas'."""

    traces: bool = False


class NibbleConfig(Record):
    http: HttpConfig = HttpConfig()
    grpc: GrpcConfig = GrpcConfig()
    artifacts: ArtifactsConfig = Field(default_factory=default_artifacts)
    auth: AuthConfig = AuthConfig()
    limits: LimitsConfig = LimitsConfig()
    logging: LoggingConfig = LoggingConfig()
    observability: ObservabilityConfig = ObservabilityConfig()
    router: RouterConfig = RouterConfig()
    models: Annotated[tuple[ModelConfig, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def has_a_cache(self) -> NibbleConfig:
        expanded(self.artifacts.cache_dir, "artifacts.cache_dir")
        return self

    @model_validator(mode="after")
    def no_clash(self) -> NibbleConfig:
        names = [name for model in self.models for name in (model.name, *model.aliases)]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(
                f"models: {', '.join(sorted(twice))} appears more than once; names and aliases must differ"
            )
        deployments: dict[str, str] = {}
        for model in self.models:
            name, other = model.deployment, deployments.setdefault(model.deployment, model.name)
            if other != model.name:
                raise ValueError(f"models: {other} and {model.name} would both be Serve's {name}; rename one")
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
