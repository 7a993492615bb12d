"""Forced tool calls of the demo models, with the real engine: small as they are, each call is valid."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

from cluster.families import FAMILY_NAMES, FamilyName
from deployments.engines.bigdl.engine import BigdlEngine
from deployments.generation.generation import generate_text
from deployments.generation.text import Tokenizer
from deployments.records import Conversation, GenerationRequest, Message, SamplingParams, Tool, ToolUse
from deployments.routing.sequences import joined

LIGHT = {
    "type": "object",
    "properties": {
        "room": {"enum": ["kitchen", "hall"]},
        "on": {"type": "boolean"},
        "note": {"type": "string", "maxLength": 12},
    },
    "required": ["room", "on"],
    "additionalProperties": False,
}
SCHEMAS = {"set_light": LIGHT, "now": {}}
TOOLS = tuple(Tool(name, "{}", json.dumps(schema)) for name, schema in SCHEMAS.items())


@pytest.mark.parametrize("family", FAMILY_NAMES)
async def test_a_forced_call_is_valid(family: FamilyName, demo_artifact: Callable[[FamilyName], Path]) -> None:
    folder = demo_artifact(family)
    engine, tokenizer = BigdlEngine(folder, threads=1, context=256), Tokenizer(folder)
    conversation = Conversation((Message("user", "What is CPU?"),), tools=TOOLS)
    try:
        for use in (
            ToolUse(("set_light",), forced=True, parallel=False),
            ToolUse(("set_light", "now"), forced=True, parallel=False),
        ):
            for seed in range(3):
                request = GenerationRequest("r", conversation, None, sampling=SamplingParams(seed=seed), tool_use=use)
                whole = joined([chunk async for chunk in generate_text(engine, tokenizer, request)])
                assert whole.finish_reason == "tool_calls"
                assert whole.message is not None
                assert whole.message.content == ""
                (call,) = whole.message.tool_calls
                assert call.name in use.names
                jsonschema.Draft202012Validator(SCHEMAS[call.name]).validate(json.loads(call.arguments))
    finally:
        engine.close()
