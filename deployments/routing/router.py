"""The models that are served, by their names. It knows nothing of Ray: a served model is reached through the small
protocol `ServedModel`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from cluster.config import LimitsConfig
from cluster.errors import ModelNotFoundError, UnavailableError
from cluster.model_config import ModelConfig
from deployments.records import Conversation, GenerationChunk, GenerationRequest
from deployments.routing.admission import REASONS
from deployments.routing.model_admission import ModelAdmission


class ServedModel(Protocol):
    """What takes longer than `timeout_s` seconds (None: no bound) raises DeadlineError."""

    config: ModelConfig
    admission: ModelAdmission  # which the caller of `generate` and `embed` passes first

    @property
    def awaited(self) -> bool:
        """Whether requests wait for its first replica instead of being refused."""
        ...

    def ready(self) -> bool:
        """Whether it takes requests: a replica runs, or the first request starts one."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        """Raises RequestError, at the first chunk or later. Closing the generator stops the replica."""
        ...

    def end(self, error: Exception) -> None:
        """What is in flight raises this error, and stops."""
        ...

    async def tokenize(
        self, text: str | Conversation, add_special_tokens: bool, timeout_s: float | None
    ) -> list[int]: ...

    async def tokenizer_info(self, timeout_s: float | None) -> dict[str, Any]:
        """As `Tokenizer.info` says."""
        ...

    async def detokenize(self, ids: Sequence[int], timeout_s: float | None) -> str: ...

    async def embed(
        self, prompt: str | tuple[int, ...], max_tokens: int | None, timeout_s: float | None
    ) -> tuple[list[float], int]:
        """The vector, and how many tokens the prompt has, `max_tokens` at most."""
        ...


class ModelCard(NamedTuple):
    """What clients are told of a model, by its name or one of its aliases. `root`: its name."""

    id: str
    root: str
    family: str
    engine: str
    quantization: str
    context: int
    ready: bool


class Router:
    def __init__(self, models: Mapping[str, ServedModel], limits: LimitsConfig | None = None) -> None:
        self.change(models, limits or LimitsConfig())
        self.draining = False  # nothing new is taken, and no model is ready

    def change(self, models: Mapping[str, ServedModel], limits: LimitsConfig) -> None:
        """Requests in flight go on as they began."""
        self._models, self.limits = models, limits
        self._by_name = {name: model for own, model in models.items() for name in (own, *model.config.aliases)}

    def end(self, error: Exception) -> None:
        """All requests in flight raise this error."""
        for model in self._models.values():
            model.end(error)

    def cards(self) -> list[ModelCard]:
        """The models by all their names: each one's own, then its aliases."""
        return [self._card(name, model) for name, model in self._by_name.items()]

    def card(self, name: str) -> ModelCard:
        """Raises ModelNotFoundError."""
        return self._card(name, self._known(name))

    def own_name(self, name: str) -> str | None:
        """Of the model with this name or alias, ready or not."""
        model = self._by_name.get(name)
        return None if model is None else model.config.name

    def refusals(self) -> dict[str, dict[str, int]]:
        """Of each model's queue so far, by reason, those that never occurred included."""
        queues = {name: model.admission.queue for name, model in self._models.items()}
        return {name: {reason: queue.refusals[reason] for reason in REASONS} for name, queue in queues.items()}

    def not_ready(self) -> list[str]:
        """The models that do not take requests."""
        return [card.id for card in self.cards() if not card.ready and card.id == card.root]

    def model(self, name: str) -> ServedModel:
        """Raises ModelNotFoundError, or UnavailableError while it has no replica and none is awaited."""
        if self.draining:
            raise going_down()
        model = self._known(name)
        if not model.ready() and not model.awaited:
            raise UnavailableError(f"model {name}: no replica is ready yet; try again later")
        return model

    def _card(self, name: str, model: ServedModel) -> ModelCard:
        config, ready = model.config, model.ready() and not self.draining
        return ModelCard(name, config.name, config.family, config.engine, config.ggml_type, config.context, ready)

    def _known(self, name: str) -> ServedModel:
        model = self._by_name.get(name)
        if model is None:
            raise ModelNotFoundError(f"model: found {name!r}, served are {', '.join(sorted(self._by_name))}")
        return model


def going_down() -> UnavailableError:
    return UnavailableError("the server is shutting down; try again later, or at another one")
