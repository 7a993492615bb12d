"""vLLM's regular expressions and choices, as a model's tokens follow them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deployments.api.requests.schema import CompletionRequest
from deployments.generation.text import Tokenizer
from tests.conftest import DEMOS

BLOOM = Tokenizer(DEMOS / "bloom")
WORDS = ['a"b', "\\n", "x\ny", "a/b", "日本", "🙂", "a::=b"]


def follows(text: str, **fields: Any) -> bool:
    """Whether the tokens of `text` are allowed one after the other, and then the end."""
    grammar = CompletionRequest(model="m", prompt="a", **fields).required_grammar()
    assert grammar is not None
    mask = BLOOM.mask(grammar)
    for token in BLOOM.encode(text, add_special_tokens=False):
        logits = np.zeros(512, np.float32)
        mask.apply(logits)
        if not np.isfinite(logits[token]):
            return False
        mask.accept(token)
    logits = np.zeros(512, np.float32)
    mask.apply(logits)
    return bool(np.isfinite(logits[sorted(BLOOM.eos_ids)]).any())


@pytest.mark.parametrize(
    ("pattern", "text", "other"),
    [
        ("a/b", "a/b", "a"),
        (r"a\/b", "a/b", "ab"),
        ("[/]", "/", "a"),
        ("a\nb", "a\nb", "ab"),
        ("x::=y", "x::=y", "x"),  # `::=` alone would make it GBNF
        ("a b # c", "a b # c", "a b"),
        (r"\d+(\.\d)?", "12.5", "12."),
        ("a|bc", "bc", "b"),
        ("é+", "éé", "e"),
    ],
)
def test_the_whole_text_matches_a_regular_expression(pattern: str, text: str, other: str) -> None:
    assert follows(text, guided_regex=pattern)
    assert not follows(other, guided_regex=pattern)
    assert follows(text, structured_outputs={"regex": pattern})


@pytest.mark.parametrize("word", WORDS)
def test_the_text_is_one_of_the_choices(word: str) -> None:
    assert follows(word, guided_choice=WORDS)
    assert not follows(word + "a", guided_choice=WORDS)
    assert follows(word, structured_outputs={"choice": [word, "x"]})
