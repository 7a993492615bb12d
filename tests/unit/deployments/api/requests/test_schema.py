"""What the bodies of requests become: records for replicas, and refusals of fields that do not go together."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.config import LimitsConfig
from cluster.errors import InvalidRequestError
from deployments.api.requests.messages import ChatMessage
from deployments.api.requests.schema import (
    SEED_STEP,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from deployments.records import Conversation, Grammar, Message

USER = {"role": "user", "content": "hi"}
SCHEMA_FORMAT = {"type": "json_schema", "json_schema": {"schema": {"type": "integer"}}}


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": "a", **fields})


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": [USER], **fields})


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [(1, 2)]), ([[1], [2, 3]], [(1,), (2, 3)])],
)
def test_each_form_of_a_prompt_is_a_list_of_prompts(prompt: Any, prompts: list[Any]) -> None:
    assert completion(prompt=prompt).prompts() == prompts
    assert EmbeddingRequest(model="m", input=prompt).inputs() == prompts


@pytest.mark.parametrize("prompt", [[], [[]], ["a", 1], [True], 1.5])
def test_no_other_form_is_accepted(prompt: Any) -> None:
    with pytest.raises(ValidationError):
        completion(prompt=prompt)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
        ({"stream_options": {}}, "stream_options"),
        ({"grammar": "start: A", "response_format": {"type": "json_object"}}, "grammar"),
        ({"grammar": "start: A", "ignore_eos": True}, "ignore_eos"),
        ({"response_format": SCHEMA_FORMAT, "ignore_eos": True}, "ignore_eos"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{field}: ") as error:
        completion(**fields).check()
    assert error.value.field == field


def test_fields_that_go_together_are_accepted() -> None:
    for fields in (
        {"max_tokens": 4, "min_tokens": 4},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"grammar": "start: A", "response_format": {"type": "text"}},
        {"response_format": {"type": "text"}, "ignore_eos": True},
        {"n": 2, "best_of": 2, "stream": True},
    ):
        completion(**fields).check()


def test_top_logprobs_of_a_chat_need_logprobs() -> None:
    with pytest.raises(InvalidRequestError, match=r"^top_logprobs: ") as error:
        chat(top_logprobs=2).check()
    assert error.value.field == "top_logprobs"
    chat(top_logprobs=2, logprobs=True).check()


@pytest.mark.parametrize(
    ("fields", "logprobs"), [({}, None), ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 3}, 3)]
)
def test_a_chat_s_log_probabilities(fields: dict[str, Any], logprobs: int | None) -> None:
    assert [request.logprobs for request in chat(**fields).completions("id", LimitsConfig())] == [logprobs]


@pytest.mark.parametrize(
    ("fields", "logprobs"),
    [({}, None), ({"logprobs": 0}, 0), ({"best_of": 2}, 0), ({"best_of": 2, "logprobs": 3}, 3), ({"n": 2}, None)],
)
def test_a_choice_among_more_sequences_needs_log_probabilities(fields: dict[str, Any], logprobs: int | None) -> None:
    assert {request.logprobs for request in completion(**fields).completions("id", LimitsConfig())} == {logprobs}


def test_one_sequence_has_the_request_s_id_and_more_have_numbers() -> None:
    limits = LimitsConfig()
    assert [request.request_id for request in completion().completions("id", limits)] == ["id"]
    several = completion(prompt=["a", "b"], n=2).completions("id", limits)
    assert [(request.request_id, request.prompt) for request in several] == [
        ("id-0", "a"),
        ("id-1", "a"),
        ("id-2", "b"),
        ("id-3", "b"),
    ]


def test_the_choices_of_a_prompt_have_seeds_of_their_own_and_the_first_has_the_request_s() -> None:
    requests = completion(prompt=["a", "b"], n=3, seed=(1 << 64) - 1).completions("id", LimitsConfig())
    seeds = [request.sampling.seed for request in requests]
    assert seeds[0] == (1 << 64) - 1
    assert seeds[1] == SEED_STEP - 1  # modulo 2 ** 64
    assert len(set(seeds[:3])) == 3
    assert seeds[3:] == seeds[:3]
    assert completion(seed=-1).completions("id", LimitsConfig())[0].sampling.seed == (1 << 64) - 1


def test_without_a_seed_two_requests_draw_different_ones() -> None:
    drawn = {completion().completions("id", LimitsConfig())[0].sampling.seed for _ in range(4)}
    assert len(drawn) == 4


@pytest.mark.parametrize(
    ("fields", "limit", "expected"),
    [({}, None, None), ({}, 9, 9), ({"max_tokens": 9}, 9, 9), ({"max_tokens": 3}, 9, 3)],
)
def test_a_chat_without_max_tokens_gets_the_operator_s_limit(
    fields: dict[str, Any], limit: int | None, expected: int | None
) -> None:
    (request,) = chat(**fields).completions("id", LimitsConfig(max_tokens=limit))
    assert request.max_tokens == expected


def test_a_default_above_the_operator_s_limit_is_lowered_and_an_explicit_value_refused() -> None:
    (request,) = completion().completions("id", LimitsConfig(max_tokens=8))
    assert request.max_tokens == 8
    for body in (completion(max_tokens=16), chat(max_tokens=16), chat(max_completion_tokens=16)):
        with pytest.raises(InvalidRequestError, match=r"^max_tokens: found 16, allowed are up to 8$"):
            body.completions("id", LimitsConfig(max_tokens=8))


@pytest.mark.parametrize(("fields", "field"), [({"n": 5}, "n"), ({"prompt": ["a"] * 5}, "prompt")])
def test_more_sequences_than_the_operator_allows_are_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError, match="5 sequences, allowed are 4") as error:
        completion(**fields).completions("id", LimitsConfig(choices=4))
    assert error.value.field == field


def test_the_operator_s_limits_go_with_each_request() -> None:
    (request,) = completion().completions("id", LimitsConfig(prompt_tokens=7, timeout_s=3))
    assert (request.max_prompt_tokens, request.timeout_s) == (7, 3)


def test_sampling_fields_reach_the_record() -> None:
    body = completion(temperature=0.5, top_k=-1, min_p=0.1, logit_bias={"7": -1.5, "8": 2}, min_tokens=2, stop="x")
    (request,) = body.completions("id", LimitsConfig())
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.min_p, sampling.min_tokens) == (0.5, 0, 0.1, 2)
    assert sampling.logit_bias == ((7, -1.5), (8, 2))
    assert request.stop == ("x",)


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ("json_schema", {"type": "object"}, "response_format")),
        ({"response_format": SCHEMA_FORMAT}, ("json_schema", {"type": "integer"}, "response_format")),
    ],
)
def test_a_format_is_a_grammar(fields: dict[str, Any], grammar: tuple[str, Any, str] | None) -> None:
    found = completion(**fields).required_grammar()
    assert (found and (found.kind, json.loads(found.text), found.field)) == grammar


def test_a_grammar_keeps_its_text() -> None:
    assert completion(grammar="start: A").required_grammar() == Grammar("grammar", "start: A", "grammar")


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"guided_json": {"type": "integer"}}, ("json_schema", '{"type": "integer"}', "guided_json")),
        ({"guided_json": '{"type":"integer"}'}, ("json_schema", '{"type":"integer"}', "guided_json")),
        ({"guided_regex": "a/b\\/c\n"}, ("grammar", "start: /a\\/b\\/c\\n/", "guided_regex")),
        ({"guided_choice": ["yes", 'n"o']}, ("grammar", 'start: "yes" | "n\\"o"', "guided_choice")),
        ({"guided_grammar": "start: A"}, ("grammar", "start: A", "guided_grammar")),
        ({"structured_outputs": {"json": {}}}, ("json_schema", "{}", "structured_outputs.json")),
        (
            {"structured_outputs": {"json_object": True}},
            ("json_schema", '{"type":"object"}', "structured_outputs.json_object"),
        ),
        ({"structured_outputs": {"choice": ["a"]}}, ("grammar", 'start: "a"', "structured_outputs.choice")),
    ],
)
def test_vllm_s_ways_to_ask_for_a_format_are_grammars(fields: dict[str, Any], grammar: tuple[str, str, str]) -> None:
    assert completion(**fields).required_grammar() == Grammar(*grammar)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"guided_json": "{"}, "guided_json", "not valid JSON"),
        ({"guided_json": "[]"}, "guided_json", "found a JSON list, expected an object"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "not together with guided_regex"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["a"]}},
            "structured_outputs.choice",
            "not together with structured_outputs.regex",
        ),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "found 0, allowed are -1"),
    ],
)
def test_formats_that_cannot_be_are_refused(fields: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as error:
        completion(**fields).check()
    assert error.value.field == field


def test_a_message_s_parts_are_one_text_and_a_developer_is_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert ChatMessage.model_validate({"role": "user", "content": parts}).message() == Message("user", "ab")
    assert ChatMessage(role="developer", content="x").message() == Message("system", "x")


def test_tokenize_takes_a_text_or_a_conversation_and_not_both() -> None:
    assert TokenizeRequest(model="m", prompt="").text() == ""
    conversation = TokenizeRequest.model_validate({"model": "m", "messages": [USER]})
    conversation.check()
    assert conversation.text() == Conversation((Message("user", "hi"),))
    for fields in ({}, {"prompt": "a", "messages": [USER]}):
        with pytest.raises(InvalidRequestError, match="exactly one of prompt and messages"):
            TokenizeRequest.model_validate({"model": "m", **fields}).check()
