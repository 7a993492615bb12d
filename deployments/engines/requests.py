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
    check_prompt(request.prompt, context, vocab_size)
    if len(request.prompt) >= context:
        raise InvalidRequestError(
            f"prompt: found {len(request.prompt)} tokens, allowed are {context - 1}:"
            f" the context of {context} tokens must hold at least one new token",
            field="prompt",
        )
