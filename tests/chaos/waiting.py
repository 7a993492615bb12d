"""Waiting for what a fault or a change ends in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

BACK_S = 300


async def until(condition: Callable[[], bool], timeout: float = BACK_S) -> float:
    """The seconds until it holds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + timeout
        await asyncio.sleep(0.05)
    return time.monotonic() - began
