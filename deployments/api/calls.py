"""One record of each request: its id, who asked, what it took, and one line in the log at its end."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from datetime import datetime, timezone
from typing import Any, Literal

from cluster.config import LoggingConfig
from cluster.errors import InvalidRequestError
from deployments.api.access import Access, Admission, Clock
from deployments.routing.router import ChoiceChunk, UsageCount
from deployments.status import INTERNAL, public_message, status_of

# A child of Serve's own logger: its handlers write to the replica's log file in Ray's session folder.
logger = logging.getLogger("ray.serve.requests")

Protocol = Literal["http", "grpc"]

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Of what a client calls a model, and of an error that repeats it, in the log.
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
    ) -> None:
        self.access = access
        self.prompts = config.prompts
        self.clock = clock
        self.now = now

    def begin(self, protocol: Protocol, method: str, presented_request_id: str | None) -> Call:
        """`method`: `POST /v1/completions` or `/nibble.v1.Inference/Generate`. A request id that a client chose is
        taken where it is short and plain, which keeps the log readable; else there is a new one."""
        given = presented_request_id
        taken = given if given is not None and REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        return Call(self, taken, protocol, method)


class Call:
    """One request, from `Calls.begin` to `end`, which must be called whatever happens."""

    def __init__(self, calls: Calls, request_id: str, protocol: Protocol, method: str) -> None:
        self.request_id = request_id
        self.protocol = protocol
        self.method = method
        self.key: str | None = None
        self.model: str | None = None
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self._calls = calls
        self._admission: Admission | None = None
        self._started = calls.clock()
        self._first_token_at: float | None = None
        self._texts: dict[str, Any] = {}
        self._ended = False

    def admit(self, presented_key: str | None) -> None:
        """Raises UnauthenticatedError or RateLimitError."""
        holder = self._calls.access.identify(presented_key)
        self.key = holder.name  # that of a refused request too
        self._admission = holder.enter()

    def first_token(self) -> None:
        """The first token has come; later ones may say so too."""
        if self._first_token_at is None:
            self._first_token_at = self._calls.clock()

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

    async def counted(
        self, chunks: AsyncGenerator[ChoiceChunk, None], sequences: int
    ) -> AsyncGenerator[ChoiceChunk, None]:
        """The same chunks of `sequences` a prompt, counted as they come: what a client that leaves has taken counts.
        Their text is noted."""
        taken = UsageCount(sequences)
        async with aclosing(chunks):
            async for item in chunks:
                taken.add(item.sequence, item.chunk)
                self.count(taken.prompt_tokens, taken.completion_tokens)
                self.note(completion=item.chunk.text)
                yield item

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
        level = level_of(error)
        if logger.isEnabledFor(level):
            # In ASCII: neither a line break nor a lone surrogate of a prompt can damage the log.
            logger.log(level, json.dumps(self._line(logging.getLevelName(level), status, error)))

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
