"""Guessing the next tokens from the text so far: what followed the last time the same tokens came by.

Prompt lookup decoding (Saxena 2023; assisted generation with `prompt_lookup_num_tokens` in transformers): good where a
text repeats itself or its prompt, as summaries, code and extracted answers do.
"""

from __future__ import annotations

from collections.abc import Sequence

from deployments.engines.openvino.batching.scheduler import Running

LONGEST_MATCH = 3  # tokens
SEARCHED = 1024  # of the latest tokens


class PromptLookup:
    """A Guesser that has no memory of its own."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def guess(self, wanted: Sequence[tuple[Running, int]]) -> list[list[int]]:
        return [look_up(sequence.tokens, limit) for sequence, limit in wanted]

    def forget(self, sequence: Running) -> None:
        pass


def look_up(tokens: Sequence[int], limit: int) -> list[int]:
    """Up to `limit` tokens that followed the latest earlier occurrence of the text's last tokens, the longest match
    first; none where even the last token is new."""
    recent = list(tokens[-SEARCHED:])
    for length in range(min(LONGEST_MATCH, len(recent) - 1), 0, -1):
        ending = recent[-length:]
        for start in range(len(recent) - length - 1, -1, -1):
            if recent[start : start + length] == ending:
                return recent[start + length : start + length + limit]
    return []
