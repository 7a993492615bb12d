"""A completion that may call tools: from the conversation with its tools to the pieces of the message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cluster.errors import InvalidRequestError
from deployments.generation.generation import generate_text
from deployments.generation.text import Tokenizer
from deployments.records import (
    Conversation,
    GenerationChunk,
    GenerationRequest,
    Message,
    Progress,
    Tool,
    ToolCall,
    ToolCallPiece,
    ToolUse,
)
from tests.conftest import DEMOS
from tests.unit.deployments.generation.scripted_engine import ScriptedEngine

WEATHER = Tool(
    "get_weather",
    '{"type":"function","function":{"name":"get_weather","parameters":{"type":"object"}}}',
    '{"properties": {"city": {"enum": ["Paris"]}}, "required": ["city"]}',
)
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
# As Qwen's template: `<tool_call>` in it, tools as JSON, calls' arguments as an object.
TEMPLATE = """\
{%- if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %} <tool_call></tool_call>
{%- endif %}
{%- for message in messages %}|{{ message.role }}:{{ message.content }}
{%- for call in message.tool_calls %}{{ call.id }} {{ call.function.name }} {{ call.function.arguments | tojson }}
{%- endfor %}{{ message.tool_call_id }}
{%- endfor %}|assistant:"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return made(tmp_path_factory.mktemp("tools"), TEMPLATE)


def made(folder: Path, template: str | None, special: str | None = None) -> Tokenizer:
    """The demo bloom's with another template; `special`: the text of another special token, its id is 511."""
    shutil.copytree(DEMOS / "bloom", folder / "b", ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / "b" / "chat_template.jinja"
    path.unlink()
    if template is not None:
        path.write_text(template)
    if special is not None:
        state = json.loads((folder / "b" / "tokenizer.json").read_text())
        flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
        state["added_tokens"].append({"id": 512, "content": special, **flags})
        (folder / "b" / "tokenizer.json").write_text(json.dumps(state))
    return Tokenizer(folder / "b")


def request(use: ToolUse | None, progress: Progress | None = None) -> GenerationRequest:
    conversation = Conversation((Message("user", "Weather?"),), tools=(WEATHER,))
    return GenerationRequest("r", conversation, None, tool_use=use, progress=progress)


async def chunks(tokenizer: Tokenizer, ids: tuple[int, ...], asked: GenerationRequest) -> list[GenerationChunk]:
    engine = ScriptedEngine((*ids, min(tokenizer.eos_ids)), context=1000)
    engine.vocab_size = 513
    return [chunk async for chunk in generate_text(engine, tokenizer, asked)]


def pieces(found: list[GenerationChunk]) -> list[ToolCallPiece]:
    return [piece for chunk in found if chunk.message is not None for piece in chunk.message.tool_calls]


def text_of(found: list[GenerationChunk]) -> str:
    return "".join(chunk.message.content for chunk in found if chunk.message is not None)


async def test_calls_come_in_pieces_and_end_the_message(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"I look.\n{CALL}\n{CALL}")
    found = await chunks(tokenizer, ids, request(ToolUse(("get_weather",))))
    assert text_of(found) == "I look."
    assert found[-1].finish_reason == "tool_calls"
    assert "".join(chunk.text for chunk in found) == f"I look.\n{CALL}\n{CALL}"
    begun = [piece for piece in pieces(found) if piece.name is not None]
    assert [(piece.index, piece.name) for piece in begun] == [(0, "get_weather"), (1, "get_weather")]
    assert len({piece.id for piece in begun}) == 2
    assert all(piece.id is not None and len(piece.id) == 9 and piece.id.isalnum() for piece in begun)
    for index in (0, 1):
        arguments = [piece.arguments for piece in pieces(found) if piece.index == index]
        assert json.loads("".join(arguments)) == {"city": "Paris"}
        assert len(arguments) > 2
    first = await chunks(tokenizer, ids, request(ToolUse(("get_weather",), parallel=False)))
    assert {piece.index for piece in pieces(first)} == {0}
    assert text_of(first) == "I look."


async def test_a_message_without_calls_is_content(tokenizer: Tokenizer) -> None:
    found = await chunks(tokenizer, tokenizer.encode("It is <b>hot</b>.\n"), request(ToolUse(("get_weather",))))
    assert text_of(found) == "It is <b>hot</b>.\n"
    assert found[-1].finish_reason == "stop"
    plain = await chunks(tokenizer, tokenizer.encode(CALL), request(None))
    assert all(chunk.message is None for chunk in plain)


async def test_a_completion_that_goes_on_elsewhere_gives_the_rest_of_the_call(tokenizer: Tokenizer) -> None:
    ids, asked = tokenizer.encode(CALL), request(ToolUse(("get_weather",)))
    whole = await chunks(tokenizer, ids, asked)
    for count in range(1, len(whole)):
        before = whole[:count]
        assert isinstance(asked.prompt, Conversation)
        progress = Progress(
            tokenizer.encode_conversation(asked.prompt),
            tuple(token for chunk in before for token in chunk.token_ids),
            sum(len(chunk.text) for chunk in before),
        )
        after = await chunks(tokenizer, ids, request(ToolUse(("get_weather",)), progress))
        both = pieces(before) + pieces(after)
        assert json.loads("".join(piece.arguments for piece in both)) == {"city": "Paris"}
        assert [piece.name for piece in both if piece.name] == ["get_weather"]
        assert after[-1].finish_reason == "tool_calls"


async def test_a_forced_call_is_opened_by_the_prompt_and_kept_by_the_grammar(tokenizer: Tokenizer) -> None:
    rest = CALL.removeprefix("<tool_call>\n")
    asked = request(ToolUse(("get_weather",), forced=True))
    engine = ScriptedEngine((*tokenizer.encode(rest), min(tokenizer.eos_ids)), context=1000)
    found = [chunk async for chunk in generate_text(engine, tokenizer, asked)]
    assert found[-1].finish_reason == "tool_calls"
    assert json.loads("".join(piece.arguments for piece in pieces(found))) == {"city": "Paris"}
    (sent,) = engine.requests
    assert tokenizer.decode(sent.prompt).endswith("|user:Weather?|assistant:<tool_call>\n")
    assert sent.mask is not None


async def test_special_tokens_of_the_form_count(tmp_path: Path) -> None:
    tokenizer = made(tmp_path, TEMPLATE.replace("<tool_call></tool_call>", "[TOOL_CALLS]"), "[TOOL_CALLS]")
    ids = (512, *tokenizer.encode(' [{"name": "get_weather", "arguments": {"city": "Paris"}}]'))
    assert tokenizer.decode(ids).startswith(" [")  # elsewhere it has no text
    found = await chunks(tokenizer, ids, request(ToolUse(("get_weather",))))
    assert json.loads("".join(piece.arguments for piece in pieces(found))) == {"city": "Paris"}
    assert text_of(found) == ""


async def test_a_template_named_tool_use_is_of_conversations_with_tools(tmp_path: Path) -> None:
    """As transformers takes it from a list."""
    made(tmp_path, None)
    path = tmp_path / "b" / "tokenizer_config.json"
    named = [{"name": "default", "template": "{{ messages[0].content }}"}, {"name": "tool_use", "template": TEMPLATE}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": named}))
    tokenizer, asked = Tokenizer(tmp_path / "b"), (Message("user", "Weather?"),)
    assert tokenizer.decode(tokenizer.encode_conversation(Conversation(asked))) == "Weather?"
    told = tokenizer.decode(tokenizer.encode_conversation(Conversation(asked, tools=(WEATHER,))))
    assert told.endswith(" <tool_call></tool_call>|user:Weather?|assistant:")
    found = await chunks(tokenizer, tokenizer.encode(CALL), request(ToolUse(("get_weather",))))
    assert [piece.name for piece in pieces(found) if piece.name is not None] == ["get_weather"]


def test_templates_get_tools_calls_and_answers(tokenizer: Tokenizer) -> None:
    messages = (
        Message("user", "Weather?"),
        Message("assistant", "", tool_calls=(ToolCall("a1b2c3d4e", "get_weather", '{"city": "Paris"}'),)),
        Message("tool", "hot", tool_call_id="a1b2c3d4e"),
    )
    told = tokenizer.decode(tokenizer.encode_conversation(Conversation(messages, tools=(WEATHER,))))
    assert told == (
        '{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}'
        ' <tool_call></tool_call>|user:Weather?|assistant:a1b2c3d4e get_weather {"city": "Paris"}'
        "|tool:hota1b2c3d4e|assistant:"
    )
    assert tokenizer.decode(tokenizer.encode_conversation(Conversation(messages[:1]))) == "|user:Weather?|assistant:"


def test_without_a_template_calls_and_answers_are_written_as_hermes_does(tmp_path: Path) -> None:
    tokenizer = made(tmp_path, None)
    messages = (
        Message("user", "Weather?"),
        Message("assistant", "", tool_calls=(ToolCall("1", "get_weather", '{"city": "Paris"}'),)),
        Message("tool", "hot", tool_call_id="1"),
    )
    told = tokenizer.decode(tokenizer.encode_conversation(Conversation(messages)))
    assert told == (
        f"Question: Weather?\nAnswer: {CALL}\nQuestion: <tool_response>\nhot\n</tool_response>\nAnswer:"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (None, "takes none"),
        ("{{ messages[0].content }}", "takes none"),
        ("{{ tools | tojson }}", r"models\[\].tool_parser: hermes, mistral, pythonic, llama3_json"),
    ],
)
async def test_a_model_that_would_not_know_how_to_call_is_refused(
    tmp_path: Path, template: str | None, why: str
) -> None:
    tokenizer = made(tmp_path, template)
    with pytest.raises(InvalidRequestError, match=why) as refused:
        await chunks(tokenizer, (5,), request(ToolUse(("get_weather",))))
    assert refused.value.field == "tools"
    rest = tokenizer.encode(CALL.removeprefix("<tool_call>\n"))
    forced = await chunks(tokenizer, rest, request(ToolUse(("get_weather",), forced=True)))
    assert forced[-1].finish_reason == "tool_calls"
