"""Clients that others wrote, against the session's server. Nothing of this may reach beyond this machine: every proxy
leads to a closed port, loopback alone is exempt."""

from __future__ import annotations

import pytest

from tests.clients.tool_environment import OFFLINE


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
