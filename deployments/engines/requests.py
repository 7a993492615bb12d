"""What every engine refuses before its library sees it."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.errors import InvalidRequestError
from deployments.engines.base import TokenRequest


def check_prompt(prompt: Sequence[int], context: int, vocab_size: int) -> None:
    """Raises InvalidRequestError(field="prompt") for a prompt that is empty, longer than the context, or has ids that
    are not in the vocabulary."""
    if not prompt:
        raise InvalidRequestError("prompt: found no tokens, at least 1 is needed", field="prompt")
    if len(prompt) > context:
        raise InvalidRequestError(f"prompt: found {len(prompt)} tokens, the context holds {context}", field="prompt")
    check_ids(prompt, vocab_size)


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raises InvalidRequestError(field="prompt") for ids that are not in the vocabulary."""
    low, high = min(ids, default=0), max(ids, default=0)
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise InvalidRequestError(f"prompt: found token id {wrong}, allowed are 0 to {vocab_size - 1}", field="prompt")


def check_request(request: TokenRequest, context: int, vocab_size: int) -> None:
    """As `check_prompt`, for a request to generate, which needs room for at least one new token."""
    if request.max_tokens < 1:
        raise InvalidRequestError(f"max_tokens: found {request.max_tokens}, allowed are 1 and more", field="max_tokens")
    if len(request.generated) >= request.max_tokens:
        raise InvalidRequestError(
            f"max_tokens: found {request.max_tokens}, allowed are {len(request.generated) + 1} and more:"
            f" {len(request.generated)} tokens were generated before",
            field="max_tokens",
        )
    tokens = [*request.prompt, *request.generated] if request.prompt else ()
    check_prompt(tokens, context, vocab_size)
    if len(tokens) >= context:
        raise InvalidRequestError(
            f"prompt: found {len(tokens)} tokens, allowed are {context - 1}:"
            f" the context of {context} tokens must hold at least one new token",
            field="prompt",
        )
