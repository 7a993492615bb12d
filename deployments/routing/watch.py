"""What watches one request's response: its deadline, the time from token to token, and whether its model has moved."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, TypeVar

from ray.exceptions import TaskCancelledError

from cluster.errors import DeadlineError, UnavailableError

R = TypeVar("R")
GRACE_S = 1.0  # a response that seems to have stalled is given so long again


class MovedError(Exception):
    """The request had not begun when its model moved: it is to be sent again."""


class Watch:
    """A context around all tries of one request. It ends a response by cancelling it, and says why. It has one timer,
    however many tokens there are."""

    def __init__(self, what: str, timeout_s: float | None, stall_s: float | None) -> None:
        """`what`: the model, for errors. `timeout_s` and `stall_s`: None is no bound."""
        self._what, self._timeout_s, self._stall_s = what, timeout_s, stall_s
        self._loop = asyncio.get_running_loop()
        self._deadline = None if timeout_s is None else self._loop.time() + timeout_s
        self._timer: asyncio.TimerHandle | None = None
        self._response: Any = None
        self._reason: Exception | None = None  # why the response was cancelled
        self._seen_at = 0.0
        self._doubted_at: float | None = None  # since when the response has seemed to have stalled
        self.begun = False  # whether any of the answer has come

    def __enter__(self) -> Watch:
        self._set_timer()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def start(self, response: R) -> R:
        """One try."""
        self._response = response
        if isinstance(self._reason, MovedError):
            self._reason = None
        elif self._reason is not None:
            self.end(self._reason)
        return response

    def progress(self) -> None:
        """A piece of the answer came."""
        self._seen_at, self._doubted_at = self._loop.time(), None
        if not self.begun:
            self.begun = True
            self._set_timer()

    def finished(self) -> None:
        """The whole answer came."""
        self.begun, self._response = True, None

    def stop(self) -> None:
        """Ends the try, where it has not finished."""
        if self._response is not None:
            self._response.cancel()
            self._response = None

    def move(self) -> None:
        if not self.begun and self._response is not None:
            self.end(MovedError())

    def end(self, reason: Exception) -> None:
        """The response is cancelled, and raises this instead."""
        self._reason = reason
        if self._response is not None:
            self._response.cancel()

    def meaning(self, error: BaseException) -> BaseException:
        """Of what a response raised: why it was cancelled, where this watch did it."""
        cancelled = isinstance(error, (TaskCancelledError, asyncio.CancelledError))  # RequestCancelledError is one
        return self._reason if cancelled and self._reason is not None else error

    async def sleep(self, seconds: float) -> None:
        """Raises DeadlineError where the request's time is over first."""
        left = seconds if self._deadline is None else self._deadline - self._loop.time()
        await asyncio.sleep(max(0.0, min(seconds, left)))
        if left < seconds:
            raise self._expired()

    def _expired(self) -> DeadlineError:
        return DeadlineError(f"the request took longer than the {self._timeout_s:g} s it was allowed")

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        due = [at for at in (self._deadline, self._stalled_at()) if at is not None]
        self._timer = self._loop.call_at(min(due), self._look) if due else None

    def _stalled_at(self) -> float | None:
        if not self.begun or self._stall_s is None:
            return None
        return self._seen_at + self._stall_s if self._doubted_at is None else self._doubted_at + GRACE_S

    def _look(self) -> None:
        now, stalled_at = self._loop.time(), self._stalled_at()
        if self._deadline is not None and now >= self._deadline:
            self.end(self._expired())
        elif stalled_at is not None and now >= stalled_at and self._doubted_at is None:
            self._doubted_at = now  # this process may have stood still itself: what came meanwhile is read first
            self._set_timer()
        elif stalled_at is not None and now >= stalled_at:
            stalled = f"its replica gave no token for {self._stall_s:g} s (limits.stall_s); it counts as frozen"
            self.end(UnavailableError(f"{self._what}: {stalled}"))
        else:
            self._set_timer()
