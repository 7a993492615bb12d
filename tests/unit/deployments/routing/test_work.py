"""Estimates of tokens, against what completions then took."""

from __future__ import annotations

import pytest

from deployments.records import Conversation, GenerationRequest, Message, Prompt, Tool
from deployments.routing.work import WorkEstimate

CONTEXT = 1000


def request(prompt: Prompt, max_tokens: int | None = 10) -> GenerationRequest:
    return GenerationRequest(request_id="r", prompt=prompt, max_tokens=max_tokens)


def test_token_ids_are_counted_and_text_has_four_characters_a_token() -> None:
    estimate = WorkEstimate(CONTEXT)
    assert estimate.of(request((1, 2, 3))) == 13
    assert estimate.of(request("x" * 80)) == 30
    conversation = Conversation(
        (Message("user", "x" * 40), Message("user", "y" * 20)), tools=(Tool("f", "d" * 20, ""),)
    )
    assert estimate.of(request(conversation)) == 30


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "tokens"), [("", 0, 1), ("x", None, CONTEXT), ("x" * 9999, 5, CONTEXT)]
)
def test_at_least_one_token_and_at_most_the_context(prompt: str, max_tokens: int | None, tokens: int) -> None:
    assert WorkEstimate(CONTEXT).of(request(prompt, max_tokens)) == tokens


def test_the_tokenizers_own_ratio_is_learned() -> None:
    estimate = WorkEstimate(CONTEXT)
    for _ in range(300):
        estimate.learn("x" * 100, 100, 0, "stop")
    assert estimate.of_prompt("x" * 200) == pytest.approx(200, rel=0.05)


def test_the_mean_length_bounds_what_is_asked_for() -> None:
    estimate = WorkEstimate(CONTEXT)
    for _ in range(300):
        estimate.learn((1,), 1, 50, "stop")
    assert estimate.of(request((1,), None)) == 51
    assert estimate.of(request((1,), 800)) == 51
    assert estimate.of(request((1,), 8)) == 9


def test_completions_that_were_cut_short_do_not_lower_the_mean() -> None:
    estimate = WorkEstimate(CONTEXT)
    for _ in range(300):
        estimate.learn((1,), 1, 16, "length")
        estimate.learn((1,), 1, 200, "stop")
        estimate.learn((1,), 1, 4, None)
    assert estimate.of(request((1,), 800)) == pytest.approx(1 + 220, rel=0.1)


def test_where_none_ends_by_itself_max_tokens_is_the_estimate() -> None:
    estimate = WorkEstimate(CONTEXT)
    for _ in range(10):
        estimate.learn((1,), 1, 64, "length")
    assert estimate.of(request((1,), 64)) == 65
