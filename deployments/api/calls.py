"""One record of each request: its id, who asked, what it took, and one line in the log at its end."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, Literal

from cluster.config import LoggingConfig
from cluster.errors import InvalidRequestError
from cluster.serve_settings import SERVE_LOGGER
from deployments.api.access import Access, Admission, Clock, Holder
from deployments.api.call_span import CallSpan
from deployments.error_statuses import INTERNAL, public_message, status_of
from deployments.observability.metrics import ModelMetrics, RouterMetrics
from deployments.observability.tracing import Attributes, Operation, trace_of
from deployments.records import EngineTimes, GenerationRequest, Trace

# A child of Serve's own logger: its handlers write to the replica's log file in Ray's session folder.
logger = logging.getLogger(f"{SERVE_LOGGER}.requests")

Protocol = Literal["http", "grpc"]

SESSION_HEADER = "x-session-id"

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Of what a client calls a model, in the log, or a session.
LONGEST_NAME = 128
LONGEST_ERROR = 500


def utc_now() -> datetime:
    return datetime.now(timezone.utc)


class Calls:
    """The requests of one router."""

    def __init__(
        self,
        access: Access,
        config: LoggingConfig,
        clock: Clock = time.monotonic,
        now: Callable[[], datetime] = utc_now,
        metrics: RouterMetrics | None = None,
        traces: bool = False,
    ) -> None:
        self.access = access
        self.prompts = config.prompts
        self.clock = clock
        self.now = now
        self.metrics = metrics or RouterMetrics()
        self.traces = traces

    def begin(
        self,
        protocol: Protocol,
        method: str,
        presented_request_id: str | None,
        headers: Mapping[str, str] | None = None,
    ) -> Call:
        """`method`: `POST /v1/completions` or `/nibble.v1.Inference/Generate`. `headers`: or metadata, of which the
        trace that the request belongs to is read."""
        span = CallSpan(trace_of(headers or {})) if self.traces else None
        return Call(self, request_id(presented_request_id), protocol, method, span)


def request_id(presented: str | None) -> str:
    """What a client chose where that is short and plain, which keeps the log readable; else a new one."""
    return presented if presented is not None and REQUEST_ID.fullmatch(presented) else uuid.uuid4().hex


class Call:
    """One request, from `Calls.begin` to `end`, which must be called whatever happens."""

    def __init__(
        self, calls: Calls, request_id: str, protocol: Protocol, method: str, span: CallSpan | None = None
    ) -> None:
        self.request_id = request_id
        self.protocol = protocol
        self.method = method
        self.key: str | None = None
        self.session: str | None = None  # as its header says
        self.model: str | None = None  # as the client calls it
        self.served: str | None = None  # the model's own name, where it is served
        self.route = method  # one of few, for the metrics
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.cached_tokens = 0  # of the prompts'
        self.finish_reasons: list[str] = []  # of the completions that have ended
        self._calls = calls
        self._holder: Holder | None = None
        self._admission: Admission | None = None
        self._started = calls.clock()
        self._first_token_at: float | None = None
        self._serving_known = False  # of that token's time, the part that was not the engine's
        self._texts: dict[str, Any] = {}
        self._ended = False
        self._metrics: ModelMetrics | None = None  # of the model that computes for it
        self._completions = 0
        self._token_at: dict[int, float] = {}  # when the last one came, by completion
        self._span = span

    def admit(self, presented_key: str | None) -> None:
        """Raises UnauthenticatedError or RateLimitError."""
        holder = self._calls.access.identify(presented_key)
        self.key, self._holder = holder.name, holder  # that of a refused request too
        self._admission = holder.enter()

    def budget(self) -> dict[str, str]:
        """Headers that say what is left of the key's tokens now."""
        return {} if self._holder is None else self._holder.budget()

    def first_token(self) -> None:
        """The first token has come; later ones may say so too."""
        if self._first_token_at is None:
            self._first_token_at = self._calls.clock()
            if self._metrics is not None:
                self._metrics.first_token.observe(self._first_token_at - self._started)

    def engine_took(self, times: EngineTimes) -> None:
        """Of a completion whose first token has come."""
        metrics, first = self._metrics, self._first_token_at
        if metrics is None or first is None:
            return
        metrics.engine_queue.observe(times.queue_s)
        metrics.engine_prefill.observe(times.prefill_s)
        if not self._serving_known:
            self._serving_known = True
            metrics.first_token_serving.observe(max(0.0, first - self._started - times.queue_s - times.prefill_s))

    def computes(self, served: str, completions: int) -> None:
        """The model of this own name computes so many completions from now on; 0: something else."""
        self.served, self._completions = served, completions
        self._metrics = self._calls.metrics.model(served)
        self._metrics.begin(self)

    @property
    def waiting(self) -> bool:
        """Whether a completion's first token has not come."""
        return self._completions > 0 and self._first_token_at is None

    def tokens_came(self, completion: int) -> None:
        """Of one of its completions, which `computes` has told of."""
        now = self._calls.clock()
        before = self._token_at.get(completion)
        if before is not None and self._metrics is not None:
            self._metrics.between_tokens.observe(now - before)
        self._token_at[completion] = now

    def trace(self, operation: Operation, model: str, requests: Sequence[GenerationRequest] = ()) -> Trace | None:
        """What makes spans a part of this request's trace; None where it is not traced. `model`: as the client calls
        it."""
        return None if self._span is None else self._span.begin(operation, model, requests)

    def about(self, model: str, prompt: Any = None) -> None:
        """What it asks for; `prompt` as `note` has it."""
        self.model = model
        self.note(prompt=prompt)

    def count(self, prompt_tokens: int, completion_tokens: int) -> None:
        """What the request has taken so far, in all. The key is charged with what is new."""
        if completion_tokens:
            self.first_token()
        new = prompt_tokens + completion_tokens - self.prompt_tokens - self.completion_tokens
        self.prompt_tokens, self.completion_tokens = prompt_tokens, completion_tokens
        if self._admission is not None:
            self._admission.spend(new)

    def note(self, prompt: Any = None, completion: str | None = None) -> None:
        """For a log with prompts: the prompt, and a further piece of the completion. Dropped where there are none."""
        if not self._calls.prompts:
            return
        if prompt is not None:
            self._texts["prompt"] = prompt
        if completion is not None:
            self._texts.setdefault("completion", []).append(completion)

    def end(self, status: int | str, error: Exception | None = None) -> None:
        """Leaves the key's place and writes the log's line; only the first call counts. `status`: HTTP's number or the
        name of gRPC's code."""
        if self._ended:
            return
        self._ended = True
        if self._admission is not None:
            self._admission.leave()
        self._count_end(status, error)
        if self._span is not None:
            self._span.end(self._span_attributes(status), error)
        level = level_of(error)
        if logger.isEnabledFor(level):
            # In ASCII: neither a line break nor a lone surrogate of a prompt can damage the log.
            logger.log(level, json.dumps(self._line(logging.getLevelName(level), status, error)))

    def _span_attributes(self, status: int | str) -> Attributes:
        first = self._first_token_at
        return {
            "nibble.request_id": self.request_id,
            "nibble.method": self.route,
            "http.response.status_code" if self.protocol == "http" else "rpc.response.status_code": status,
            "gen_ai.response.model": self.served,
            "gen_ai.response.finish_reasons": self.finish_reasons,
            "gen_ai.response.time_to_first_chunk": None if first is None else first - self._started,
            "gen_ai.usage.input_tokens": self.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": self.cached_tokens,
            "gen_ai.usage.output_tokens": self.completion_tokens,
        }

    def _count_end(self, status: int | str, error: Exception | None) -> None:
        self._calls.metrics.answered(self.protocol, self.route, str(status))
        if error is not None:
            self._calls.metrics.refused(self.served, status_of(error).reason.lower())
        metrics = self._metrics
        if metrics is None:
            return
        metrics.end(self)
        unfinished = self._completions - len(self.finish_reasons)
        metrics.completed(self.finish_reasons, unfinished if error is None else 0)
        if self._completions and not unfinished:
            metrics.request.observe(self._calls.clock() - self._started)
            metrics.looked_up(self.prompt_tokens, self.cached_tokens)

    def _line(self, level: str, status: int | str, error: Exception | None) -> dict[str, Any]:
        ended = self._calls.clock()
        first = self._first_token_at
        line = {
            "time": self._calls.now().isoformat(timespec="milliseconds"),
            "level": level,
            "request_id": self.request_id,
            "protocol": self.protocol,
            "method": self.method,
            "key": self.key,
            "model": None if self.model is None else self.model[:LONGEST_NAME],
            "status": status,
            "error": None if error is None else self._told(error)[:LONGEST_ERROR],
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "seconds": round(ended - self._started, 6),
            "first_token_seconds": None if first is None else round(first - self._started, 6),
        }
        if "prompt" in self._texts:
            line["prompt"] = self._texts["prompt"]
        if "completion" in self._texts:
            line["completion"] = "".join(self._texts["completion"])
        return line

    def _told(self, error: Exception) -> str:
        if isinstance(error, InvalidRequestError) and not self._calls.prompts:
            # Its message shows what was found, which may be the prompt.
            return f"refused: {error.field or 'body'}"
        return public_message(error)


def level_of(error: Exception | None) -> int:
    """A request that was refused is a warning, one that broke an error."""
    if error is None:
        return logging.INFO
    return logging.ERROR if status_of(error) is INTERNAL else logging.WARNING
