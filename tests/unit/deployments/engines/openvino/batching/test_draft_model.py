"""The draft model's books, with a model whose next token depends on every token that its cache holds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest

from deployments.engines.openvino.batching.draft_model import DraftModel
from deployments.engines.openvino.batching.paged_cache import BLOCK_TOKENS, BlockPool
from deployments.engines.openvino.batching.scheduler import Running
from deployments.engines.openvino.paged_model import PagedModel, Work

VOCABULARY, STEP_TOKENS = 50, 64


def following(tokens: Sequence[int]) -> int:
    return (sum(place * token for place, token in enumerate(tokens, 1)) + len(tokens)) % VOCABULARY


class CachedModel:
    """Reads what came before from its cache alone, as attention does. `steps`: the tokens that each step computed."""

    vocab_size = VOCABULARY

    def __init__(self, blocks: int) -> None:
        self._cache = np.full((blocks, BLOCK_TOKENS), -1)
        self.steps: list[int] = []

    def step(self, works: Sequence[Work]) -> tuple[npt.NDArray[np.float32], None]:
        logits = np.zeros((len(works), VOCABULARY), np.float32)
        for row, work in zip(logits, works, strict=True):
            for place, token in enumerate(work.tokens, work.past):
                self._cache[work.table[place // BLOCK_TOKENS], place % BLOCK_TOKENS] = token
            cached = self._cache[list(work.table)].reshape(-1)[: work.past + len(work.tokens)]
            row[following(cached.tolist())] = 1
        self.steps.append(sum(len(work.tokens) for work in works))
        return logits, None


@pytest.fixture
def model() -> CachedModel:
    return CachedModel(64)


def draft_of(model: CachedModel, blocks: int = 64) -> DraftModel:
    return DraftModel(cast(PagedModel, model), BlockPool(blocks), 4, STEP_TOKENS, VOCABULARY)


def right(tokens: Sequence[int], count: int) -> list[int]:
    """What the model itself would say next."""
    text = list(tokens)
    for _ in range(count):
        text.append(following(text))
    return text[len(tokens) :]


def test_it_guesses_what_it_would_say_itself_and_computes_no_token_twice(model: CachedModel) -> None:
    draft, sequence = draft_of(model), Running([3, 1, 4])
    assert draft.guess([(sequence, 4)]) == [right(sequence.tokens, 4)]
    assert model.steps == [3, 1, 1, 1]
    sequence.tokens += right(sequence.tokens, 4)  # all of them were right, and one more token came
    sequence.tokens.append(7)
    assert draft.guess([(sequence, 2)]) == [right(sequence.tokens, 2)]
    assert model.steps[4:] == [2, 1]


def test_wrong_guesses_are_forgotten_wherever_they_begin(model: CachedModel) -> None:
    draw = random.Random(5)
    draft, sequences = draft_of(model), [Running([draw.randrange(VOCABULARY) for _ in range(n)]) for n in (1, 30, 33)]
    for _ in range(60):
        limits = [draw.randint(1, 4) for _ in sequences]
        guesses = draft.guess(list(zip(sequences, limits, strict=True)))
        for sequence, limit, found in zip(sequences, limits, guesses, strict=True):
            assert found == right(sequence.tokens, limit)
            sequence.tokens += [*found[: draw.randint(0, limit)], draw.randrange(VOCABULARY)]
        draft.check_integrity()


def test_a_long_prompt_is_computed_a_step_at_a_time(model: CachedModel) -> None:
    draft, long, short = draft_of(model), Running([1] * 100), Running([2] * 5)
    wanted = [(long, 2), (short, 2)]
    assert draft.guess(wanted) == [[], []]
    assert draft.guess(wanted) == [right(long.tokens, 2), right(short.tokens, 2)]
    assert model.steps == [64, 41, 2]


def test_prompts_that_begin_alike_share_blocks(model: CachedModel) -> None:
    draft, same = draft_of(model), [5] * (2 * BLOCK_TOKENS - 10)
    first, second = Running([*same, *range(20)]), Running([*same, *range(20), 9, 9])
    for _ in range(2):
        draft.guess([(first, 1)])
    before = sum(model.steps)
    assert draft.guess([(second, 1)]) == [right(second.tokens, 1)]
    assert sum(model.steps) - before == len(second.tokens) - 2 * BLOCK_TOKENS
    draft.forget(first)
    assert draft.guess([(second, 1)]) == [right(second.tokens, 1)]


def test_where_blocks_are_lacking_there_are_fewer_guesses_and_no_error(model: CachedModel) -> None:
    draft = draft_of(model, blocks=2)
    first, second = Running([1] * (BLOCK_TOKENS - 1)), Running([2] * (BLOCK_TOKENS - 1))
    expected = [right(each.tokens, 2) for each in (first, second)]
    assert draft.guess([(first, 4), (second, 4)]) == expected  # a third one's token would need a block
    draft.forget(second)
    assert draft.guess([(first, 4)]) == [right(first.tokens, 4)]
    draft.check_integrity()


def test_tokens_that_only_one_of_the_models_has_are_no_error(model: CachedModel) -> None:
    draft = DraftModel(cast(PagedModel, model), BlockPool(4), 4, STEP_TOKENS, vocabulary=10)
    (guesses,) = draft.guess([(Running([VOCABULARY + 3, 1]), 4)])
    assert len(guesses) == 4
    assert max(guesses) < 10
