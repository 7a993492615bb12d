from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.generation.tool_calls import FORMS, form_of
from deployments.generation.tool_calls.events import ArgumentsPiece, CallBegun, CallEnded, Content
from tests.examples import examples
from tests.unit.deployments.generation.tool_calls.reading import NAMES, calls, content, read

PARIS = ("get_weather", {"city": "Paris"})
SUM = ("add", {"a": 1, "b": -2.5})
# By form: texts as models write them, the calls in them, and what is content.
TEXTS = {
    "hermes": [
        ('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>', [PARIS], ""),
        (
            'Let me look.\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": -2.5}}\n</tool_call>\n',
            [PARIS, SUM],
            "Let me look.",
        ),
        ('<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}</tool_call>', [PARIS], ""),
        ('<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>', [PARIS], ""),
        ('<tool_call>{"name": "now"}</tool_call> Done.', [("now", {})], " Done."),
        ('<tool_call>{"name": "now", "arguments": null}</tool_call>', [("now", {})], ""),
        # The last bracket or the closing tag forgotten.
        ('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}\n</tool_call>', [PARIS], ""),
        (
            '<tool_call>{"name": "now", "arguments": {}}\n<tool_call>{"name": "now", "arguments": {}}',
            [("now", {}), ("now", {})],
            "",
        ),
        (
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "a\n\\"<tool_call>\\u00e9"}}\n</tool_call>',
            [("get_weather", {"city": 'a\n"<tool_call>é'})],
            "",
        ),
        ("<tool_call>\n{'name': 'now'}\n</tool_call>", [], "<tool_call>\n{'name': 'now'}\n</tool_call>"),
        ("An <tool is no <tool_call> of mine.  ", [], "An <tool is no <tool_call> of mine.  "),
        ('<tool_call>{"name": "rm", "arguments": {}}</tool_call>', [], None),
        ('<tool_call>{"name": "now", "arguments": []}</tool_call>', [], None),
        ('<tool_call>{"arguments": {}}</tool_call>', [], None),
        ('<tool_call>{"na', [], None),
    ],
    "llama3_json": [
        ('{"name": "get_weather", "parameters": {"city": "Paris"}}', [PARIS], ""),
        ('\n\n{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}} ', [PARIS], ""),
        (
            '{"name": "get_weather", "parameters": {"city": "Paris"}}; '
            '{"name": "add", "parameters": {"a": 1, "b": -2.5}}',
            [PARIS, SUM],
            "",
        ),
        ('<|python_tag|>{"name": "add", "arguments": {"a": 1, "b": -2.5}}', [SUM], ""),
        ('{"answer": 42}', [], '{"answer": 42}'),
        ('{"name": "Anna", "parameters": {}}', [], None),
        ("{", [], "{"),
        (' {"name": "now", "parameters": {}} or so', [("now", {})], " or so"),
        ('The call is {"name": "now", "parameters": {}}', [], None),
        ('<|python_tag|>brave_search.call(query="a")', [], None),
    ],
    "pythonic": [
        ("[get_weather(city='Paris')]", [PARIS], ""),
        ('[get_weather(city="Paris"), add(a=1, b=-2.5), now()]', [PARIS, SUM, ("now", {})], ""),
        (
            """[get_weather(city='L\\'Aquila "A"\\n\\x41\\d', days=[1, 2], at={'x': None, "y": [True, false]},)]\n""",
            [("get_weather", {"city": 'L\'Aquila "A"\nA\\d', "days": [1, 2], "at": {"x": None, "y": [True, False]}})],
            "",
        ),
        ('{"name": "get_weather", "parameters": {"city": "Paris"}}', [PARIS], ""),
        ("[1, 2, 3]", [], "[1, 2, 3]"),
        ("[now]", [], "[now]"),
        ("[rm(path='/')]", [], "[rm(path='/')]"),
        ("Call [now()]", [], "Call [now()]"),
        ("[", [], "["),
    ],
    "mistral": [
        ('[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}]', [PARIS], ""),
        (
            'Well. [TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "a1b2c3d4e"},'
            ' {"name": "add", "arguments": {"a": 1, "b": -2.5}}]',
            [PARIS, SUM],
            "Well.",
        ),
        ('[TOOL_CALLS]get_weather{"city": "Paris"}[TOOL_CALLS]add{"a": 1, "b": -2.5}', [PARIS, SUM], ""),
        ('[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}', [PARIS], ""),
        ('[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{"city": "Paris"}', [PARIS], ""),
        ("[TOOL_CALLS]rm{}", [], "[TOOL_CALLS]rm{}"),
        ("[TOOL_CALLS][]", [], "[TOOL_CALLS][]"),
        ("[TOOL", [], "[TOOL"),
        ("[TOOL_CALLS]now[TOOL_CALLS]", [], None),
    ],
}
CASES = [(name, *case) for name, cases in TEXTS.items() for case in cases]
# Of which texts are made that nearly are calls.
PIECES = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>",
    '{"name": "', "get_weather", "now", "add",
    '", "arguments": ', '", "parameters": ', '{"city": "', "Paris", '"}', "}", "{", "{}", "[", "]", "(", ")", "=", ",",
    ";", "'", '"', ":", " ", "\n", "1", "-", "e", "true", "None", "\\", "\\u00", "é", "x", "now()", "add(a=1",
]  # fmt: skip
NEARLY = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


@pytest.mark.parametrize(("name", "text", "expected", "rest"), CASES)
def test_calls_are_read_and_all_other_text_is_content(
    name: str, text: str, expected: list[tuple[str, object]], rest: str | None
) -> None:
    """`rest` None: the whole text."""
    events = read(FORMS[name], text)
    assert calls(events) == expected
    assert content(events) == (text if rest is None else rest)


@pytest.mark.generated
@settings(max_examples=examples(150, 3000), deadline=None)
@given(st.sampled_from(sorted(FORMS)), st.data())
def test_the_events_do_not_depend_on_the_pieces(name: str, data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([case[0] for case in TEXTS[name]]) | NEARLY)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=len(text))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(FORMS[name], *pieces) == read(FORMS[name], text) == read(FORMS[name], *text)


@pytest.mark.generated
@settings(max_examples=examples(300, 5000), deadline=None)
@given(st.sampled_from(sorted(FORMS)), NEARLY)
def test_a_text_without_a_call_comes_back_and_arguments_are_json(name: str, text: str) -> None:
    events = read(FORMS[name], text)
    calls(events)  # raises for arguments of a call that ended and are no JSON
    if not any(isinstance(event, CallBegun) for event in events):
        assert content(events) == text
    else:
        # What was begun is a known function; no event of a call comes outside of one.
        assert {event.name for event in events if isinstance(event, CallBegun)} <= set(NAMES)
        kinds = [type(event) for event in events if not isinstance(event, Content)]
        assert kinds[0] is CallBegun
        assert all(a is ArgumentsPiece for a, b in pairwise(kinds) if b is CallEnded)


@pytest.mark.parametrize(
    ("name", "text", "given"),
    [
        ("hermes", '<tool_call>{"name": "get_weather", "arguments": {"city": "Par', '{"city": "Par'),
        ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Par', '{"city": "Par'),
        ("pythonic", "[get_weather(city='Par", '{"city": "Par'),
        ("mistral", '[TOOL_CALLS]get_weather{"city": "Par', '{"city": "Par'),
    ],
)
def test_the_name_and_what_is_there_of_the_arguments_come_at_once(name: str, text: str, given: str) -> None:
    reader = FORMS[name](NAMES)
    assert reader.add(text) == [CallBegun("get_weather"), ArgumentsPiece(given)]
    assert reader.end() == []  # a call that is cut off does not end


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1 nonsense}}</tool_call>'),
        ("mistral", '[TOOL_CALLS]add{"a": 1 nonsense}'),
        ("llama3_json", '{"name": "add", "parameters": {"a": 1 nonsense}}'),
        ("pythonic", "[add(a=1 nonsense)]"),
    ],
)
def test_what_breaks_off_the_arguments_is_content(name: str, text: str) -> None:
    events = read(FORMS[name], text)
    assert events[0] == CallBegun("add")
    assert calls(events) == []
    assert content(events).strip().startswith("nonsense")
    assert content(events).endswith(text[-3:])


@pytest.mark.parametrize("name", sorted(FORMS))
def test_content_is_given_as_soon_as_it_can_be_no_call(name: str) -> None:
    reader = FORMS[name](NAMES)
    assert reader.add("Hello") == [Content("Hello")]
    assert reader.add(" there") == [Content(" there")]


@pytest.mark.parametrize("depth", [50, 5000])
def test_deep_values_are_read_or_refused(depth: int) -> None:
    deep = "[" * depth + "]" * depth
    found = calls(read(FORMS["hermes"], f'<tool_call>{{"name": "add", "arguments": {{"a": {deep}}}}}</tool_call>'))
    assert len(found) == (depth == 50)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{%- if tools %}<tools>…</tools> within <tool_call></tool_call> XML tags:\n<tool_call>", "hermes"),
        ("{{- '<tool_call>\\n<function=' + tool.name }}", None),
        ('{{ \'{"name": function name, "parameters": dictionary of argument name and its value}\' }}', "llama3_json"),
        ('{{- "{\\"name\\": function name, \\"parameters\\": dictionary of argument name}" }}', "llama3_json"),
        ("{{ 'Format: [func_name1(params_name1=params_value1), func_name2(params)]' }}", "pythonic"),
        ('{{- "[TOOL_CALLS] [" }}', "mistral"),
        ("{{ messages[0].content }}", None),
        (None, None),
    ],
)  # fmt: skip
def test_the_form_is_known_by_the_template(template: str | None, name: str | None) -> None:
    assert form_of(template) is (FORMS[name] if name else None)
    assert form_of(template, "mistral") is FORMS["mistral"]
