"""Whether an engine still computes: what a replica tells Serve, which replaces one that does not."""

from __future__ import annotations

import time
from collections.abc import Callable

from cluster.errors import EngineError

FAILURES = 3  # in a row: an error that one request causes does not come three times with different ones


class EngineHealth:
    """Written by the engine's own thread, read by others. `clock` in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._last_error: BaseException | None = None
        self._working_since: float | None = None
        self.ended: BaseException | None = None  # why the engine's thread is no more

    def working(self) -> None:
        """A step begins, or goes on."""
        self._working_since = self._clock()

    def idle(self) -> None:
        self._working_since = None

    def succeeded(self) -> None:
        self._failures = 0

    def failed(self, error: BaseException) -> None:
        self._failures += 1
        self._last_error = error

    def check(self, stall_s: float | None) -> None:
        """Raises EngineError where the engine's thread has ended, several steps in a row have failed, or one takes
        longer than `stall_s` seconds."""
        if self.ended is not None:
            raise EngineError(f"the engine has ended: {type(self.ended).__name__}: {self.ended}")
        if self._failures >= FAILURES:
            raise EngineError(f"{self._failures} steps in a row have failed, the last with: {self._last_error}")
        since = self._working_since
        if stall_s is not None and since is not None and self._clock() - since > stall_s:
            raise EngineError(f"a step takes longer than {stall_s:g} s (limits.stall_s)")
