from __future__ import annotations

import pytest

from cluster.errors import InvalidRequestError
from deployments.engines.base import TokenRequest
from deployments.engines.requests import check_prompt, check_request

CONTEXT, VOCABULARY = 8, 100


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "found no tokens"),
        ([1] * 9, "found 9 tokens, the context holds 8"),
        ([1, 100], "found token id 100, allowed are 0 to 99"),
        ([-1, 100], "found token id -1"),
    ],
)
def test_a_prompt_that_cannot_be_computed_is_refused(prompt: list[int], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as error:
        check_prompt(prompt, CONTEXT, VOCABULARY)
    assert error.value.field == "prompt"


def test_a_prompt_may_fill_the_context_where_nothing_is_generated() -> None:
    check_prompt([0, 99] * 4, CONTEXT, VOCABULARY)
    with pytest.raises(InvalidRequestError, match="found 8 tokens, allowed are 7"):
        check_request(TokenRequest([1] * 8, 1), CONTEXT, VOCABULARY)
    check_request(TokenRequest([1] * 7, 1), CONTEXT, VOCABULARY)


def test_at_least_one_token_is_to_be_generated() -> None:
    for request in (TokenRequest([1], 0), TokenRequest([1], 2, generated=[1, 2])):
        with pytest.raises(InvalidRequestError) as error:
            check_request(request, CONTEXT, VOCABULARY)
        assert error.value.field == "max_tokens"
    check_request(TokenRequest([1], 3, generated=[1, 2]), CONTEXT, VOCABULARY)


def test_tokens_that_another_replica_generated_are_a_part_of_the_context() -> None:
    with pytest.raises(InvalidRequestError, match="found 8 tokens"):
        check_request(TokenRequest([1] * 5, 9, generated=[1] * 3), CONTEXT, VOCABULARY)
    with pytest.raises(InvalidRequestError, match="token id 100"):
        check_request(TokenRequest([1], 9, generated=[100]), CONTEXT, VOCABULARY)
    with pytest.raises(InvalidRequestError, match="found no tokens"):
        check_request(TokenRequest([], 9, generated=[1]), CONTEXT, VOCABULARY)
