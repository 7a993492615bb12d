"""For tests that act while a sequence runs: with it the sequence lasts for a second or more on any machine."""

from __future__ import annotations

import time

from deployments.engines.base import Logits


class SlowMask:
    """A TokenMask that allows every token, each after 10 ms."""

    def apply(self, logits: Logits) -> None:
        time.sleep(0.01)

    def accept(self, token: int) -> None: ...
