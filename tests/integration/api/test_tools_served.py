"""Tools on a running cluster, with the openai package."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest

from tests.integration.processes import Served

MESSAGES = [{"role": "user", "content": "What is CPU?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "set_light",
            "parameters": {
                "type": "object",
                "properties": {"room": {"enum": ["kitchen", "hall"]}, "on": {"type": "boolean"}},
                "required": ["room", "on"],
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
LIGHT = {"type": "function", "function": {"name": "set_light"}}


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.http}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("model", ["llama", "starcoder"])  # with a chat template and without one
def test_openai_tool_calls_that_are_forced(client: openai.OpenAI, model: str) -> None:
    options = {"model": model, "messages": MESSAGES, "tools": TOOLS, "temperature": 1, "seed": 5}
    named = client.chat.completions.create(**options, tool_choice=LIGHT)
    (call,) = named.choices[0].message.tool_calls
    assert named.choices[0].finish_reason == "tool_calls"
    assert named.choices[0].message.content is None
    assert call.function.name == "set_light"
    arguments = json.loads(call.function.arguments)
    assert arguments["room"] in ("kitchen", "hall")
    assert isinstance(arguments["on"], bool)
    with client.chat.completions.stream(**options, tool_choice=LIGHT) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls
    assert [(c.function.name, c.function.arguments) for c in streamed] == [("set_light", call.function.arguments)]
    one = client.chat.completions.create(**options, tool_choice="required", parallel_tool_calls=False)
    (required,) = one.choices[0].message.tool_calls
    assert required.function.name in ("set_light", "now")
    # The loop: the answer goes back as it came, with what the tool said.
    answer = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    messages = [*MESSAGES, named.choices[0].message.model_dump(), answer]
    last = client.chat.completions.create(
        **options | {"messages": messages}, tool_choice="none", max_completion_tokens=5
    )
    assert last.choices[0].message.tool_calls is None


def test_openai_tools_that_a_template_does_not_take_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="chat template takes none") as refused:
        client.chat.completions.create(model="llama", messages=MESSAGES, tools=TOOLS)
    assert refused.value.param == "tools"
