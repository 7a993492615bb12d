"""OpenAI's Node package and the AI SDK: what they ask is in tests/clients/node."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.clients.tool_environment import HERE, node_tool, run_script
from tests.integration.processes import Served

pytestmark = pytest.mark.timeout(1200)  # the first run installs them

LIGHTS = [{"room": room, "on": on} for room in ("kitchen", "hall") for on in (True, False)]
Script = Callable[[str], dict[str, Any]]


@pytest.fixture
def script(served: Served, tmp_path: Path) -> Script:
    def run(name: str) -> dict[str, Any]:
        (tmp_path / "node_modules").symlink_to(node_tool() / "node_modules")
        shutil.copy(HERE / "node" / name, tmp_path)
        return run_script(["node", name], tmp_path, BASE_URL=f"{served.http}/v1")

    return run


def test_openai_s_node_package(script: Script) -> None:
    found = script("openai_sdk.mjs")
    assert found["chat"]
    assert found["streamed"] == found["chat"]
    assert found["total_tokens"] > 12
    assert found["next_turn"] in ("length", "stop")
    assert found["parsed"] in LIGHTS
    assert found["call"] in LIGHTS
    assert found["told"] is None
    assert found["response"]
    assert found["response_streamed"] == found["response"]
    assert found["response_parsed"] in LIGHTS
    assert len(set(found["widths"])) == 1
    assert {"llama", "bloom"} <= set(found["models"])
    assert found["refused"] == ["NotFoundError", 404, "model_not_found"]


def test_the_ai_sdk_by_each_of_its_providers(script: Script) -> None:
    found = script("ai_sdk.mjs")
    for provider in ("responses", "chat", "completion", "compatible"):
        asked = found[provider]
        assert asked["text"], provider
        assert asked["streamed"] == asked["text"], provider
        assert asked["tokens"] > 12, provider
    for provider in ("responses", "chat", "compatible"):
        asked = found[provider]
        assert asked["object"] in LIGHTS, provider
        call, text = asked["steps"]
        (arguments,) = call["calls"]
        assert arguments in LIGHTS, provider
        assert call["finish"] == "tool-calls", provider
        assert call["results"] == [f"{arguments['room']}: done"], provider
        assert text["calls"] == [], provider
    assert len(found["widths"]) == 2
