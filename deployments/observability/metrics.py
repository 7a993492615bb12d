"""The metrics of one router: counted by its requests, read at a scrape. For use on one event loop, without a lock.

Names and labels are vLLM's where the meaning is vLLM's, else they begin with `nibble_`. A token costs one subtraction
and one place in a histogram; all else is counted once a request, or read from the requests in flight at a scrape.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import accumulate
from typing import Any, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from deployments.observability.definitions import ROUTER_METRICS, Definition

# Upper bounds in seconds, with +Inf beyond the last.
FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
BETWEEN_TOKENS_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 40.0)
REQUEST_S = (
    0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 240.0, 480.0, 960.0,
)  # fmt: skip

ABORTED = "abort"  # vLLM's reason of what ended because its client left


class Histogram:
    """Counts of values by upper bounds."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """As Prometheus has them: how many values are at most each bound."""
        names = [*map(str, self._bounds), "+Inf"]
        return list(zip(names, map(float, accumulate(self._counts)), strict=True))

    @property
    def sum(self) -> float:
        return self._sum


class Computed(Protocol):
    """A request for which a model computes: what it took so far."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def waiting(self) -> bool:
        """Whether its first token has not come."""
        ...


class ModelMetrics:
    """Of one model, by its own name."""

    def __init__(self) -> None:
        self.ongoing: set[Computed] = set()
        self.finished: Counter[str] = Counter()  # completions, by reason
        self.prompt_tokens = self.completion_tokens = 0  # of requests that have ended
        self.looked_up_tokens = self.cached_tokens = 0
        self.first_token = Histogram(FIRST_TOKEN_S)
        self.first_token_serving = Histogram(FIRST_TOKEN_S)
        self.engine_queue = Histogram(FIRST_TOKEN_S)
        self.engine_prefill = Histogram(FIRST_TOKEN_S)
        self.between_tokens = Histogram(BETWEEN_TOKENS_S)
        self.request = Histogram(REQUEST_S)

    def begin(self, request: Computed) -> None:
        self.ongoing.add(request)

    def end(self, request: Computed) -> None:
        """Only a request that has begun."""
        self.ongoing.remove(request)
        self.prompt_tokens += request.prompt_tokens
        self.completion_tokens += request.completion_tokens

    def looked_up(self, prompt_tokens: int, cached_tokens: int) -> None:
        """Of a request whose replica has told how much of its prompt it had in its KV cache."""
        self.looked_up_tokens += prompt_tokens
        self.cached_tokens += cached_tokens

    def completed(self, reasons: Iterable[str], unfinished: int) -> None:
        """The completions of one request, `unfinished` of which ended because its client left."""
        # The calls of tools are a matter of the text: the engine stopped.
        self.finished.update("stop" if reason == "tool_calls" else reason for reason in reasons)
        if unfinished:
            self.finished[ABORTED] += unfinished

    def values(self) -> dict[str, float]:
        """Of the counters and gauges without further labels."""
        waiting = sum(request.waiting for request in self.ongoing)
        return {
            "vllm:num_requests_running": len(self.ongoing) - waiting,
            "vllm:num_requests_waiting": waiting,
            "vllm:prompt_tokens": self.prompt_tokens + sum(request.prompt_tokens for request in self.ongoing),
            "vllm:generation_tokens": self.completion_tokens
            + sum(request.completion_tokens for request in self.ongoing),
            "vllm:prefix_cache_queries": self.looked_up_tokens,
            "vllm:prefix_cache_hits": self.cached_tokens,
        }

    def histograms(self) -> dict[str, Histogram]:
        return {
            "vllm:time_to_first_token_seconds": self.first_token,
            "nibble_serving_time_to_first_token_seconds": self.first_token_serving,
            "vllm:request_queue_time_seconds": self.engine_queue,
            "vllm:request_prefill_time_seconds": self.engine_prefill,
            "vllm:inter_token_latency_seconds": self.between_tokens,
            "vllm:e2e_request_latency_seconds": self.request,
        }


class ModelState(Protocol):
    """What is told of a served model, whatever has been asked of it; a `ModelCard` is one."""

    @property
    def root(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def engine(self) -> str: ...
    @property
    def quantization(self) -> str: ...
    @property
    def ready(self) -> bool: ...


class RouterMetrics:
    """`router` names the process, in each sample: several routers have counters of their own."""

    def __init__(self, router: str = "") -> None:
        self.router = router
        self._requests: Counter[tuple[str, str, str]] = Counter()  # by API, method, status
        self._refused: Counter[tuple[str, str]] = Counter()  # by model, reason
        self._models: defaultdict[str, ModelMetrics] = defaultdict(ModelMetrics)

    def model(self, name: str) -> ModelMetrics:
        """Only of names that the configuration has: each is a series for good."""
        return self._models[name]

    def answered(self, api: str, method: str, status: str) -> None:
        self._requests[api, method, status] += 1

    def refused(self, model: str | None, reason: str) -> None:
        self._refused[model or "", reason] += 1

    def families(
        self, served: Iterable[ModelState], refusals: Mapping[str, Mapping[str, int]] | None = None
    ) -> list[Metric]:
        """All that a scrape shows of this router. `served`: the models by their own names; `refusals`: of each one's
        queue, by reason."""
        models = list(served)
        for model in models:
            self.model(model.root)  # zeros of what nobody asked for yet: a rate needs them
        found = {definition.name: family(definition) for definition in ROUTER_METRICS}
        for request, count in self._requests.items():
            self._add(found["nibble_requests"], request, count)
        for refusal, count in self._refused.items():
            self._add(found["nibble_refused"], refusal, count)
        for model_name, reasons in (refusals or {}).items():
            for reason, count in reasons.items():
                self._add(found["nibble_admission_refusals"], (model_name, reason), count)
        self._add(found["nibble_build_info"], (version("nibble-serve"),), 1)
        for model in models:
            self._add(found["nibble_model_ready"], (model.root,), model.ready)
            self._add(found["nibble_model_info"], (model.root, model.family, model.engine, model.quantization), 1)
        for name, metrics in self._models.items():
            for metric, value in metrics.values().items():
                self._add(found[metric], (name,), value)
            for reason, count in metrics.finished.items():
                self._add(found["vllm:request_success"], (name, reason), count)
            for metric, histogram in metrics.histograms().items():
                found[metric].add_metric((name, self.router), histogram.buckets, histogram.sum)
        return list(found.values())

    def _add(self, to: Any, labels: Sequence[str], value: float) -> None:
        to.add_metric((*labels, self.router), value)


def family(definition: Definition) -> Any:
    """Without a sample; the kinds of families differ in what `add_metric` takes."""
    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
    return kinds[definition.kind](definition.name, definition.help, labels=definition.labels)


def merged(families: Iterable[Metric]) -> Iterator[Metric]:
    """Each metric once, with the samples of all its families, for those that have any."""
    found: dict[str, Metric] = {}
    for each in families:
        if each.samples:
            one = found.setdefault(each.name, Metric(each.name, each.documentation, each.type))
            one.samples += each.samples
    yield from found.values()
