"""From an engine's own thread to the task that awaits its results."""

from __future__ import annotations

import asyncio
import threading
from typing import Generic, TypeVar

from cluster.errors import EngineError

T = TypeVar("T")


class Handover(Generic[T]):
    """Tokens (or another result) from the engine's thread to the task that awaits them; a slow taker gets several at
    once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ready = asyncio.Event()
        self._lock = threading.Lock()
        self._items: list[T] = []
        self._error: BaseException | None = None
        self.cancelled = False

    def put(self, *items: T) -> None:
        with self._lock:
            first = not self._items
            self._items += items
        if first and items:
            self._wake()

    def fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = error
        self._wake()

    def cancel(self) -> None:
        self.cancelled = True

    async def take(self) -> list[T]:
        """At least one item, in order. Raises what `fail` was given once the items before it are taken."""
        while True:
            await self._ready.wait()
            with self._lock:
                items, self._items = self._items, []
                if self._error is None:
                    self._ready.clear()
            if items:
                return items
            if self._error is not None:
                raise self._error

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:  # the loop is closed: nobody waits any more
            self.cancelled = True


def closed_error() -> EngineError:
    return EngineError("the engine is closed")
