"""Draft tokens of the openvino engine, from the prompt or from a draft model: fewer steps, and the same tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from cluster.families import FamilyName
from deployments.engines.base import TokenRequest
from deployments.engines.openvino.batching.draft_model import DraftModel
from deployments.records import SamplingParams
from tests.integration.engines.openvino_engines import GREEDY, TOKENS, Artifact, Load, ids, llama_engines, prompt


@pytest.fixture
def llama(demo_artifact: Artifact) -> Iterator[Load]:
    with llama_engines(demo_artifact) as load:
        yield load


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=0.3, seed=3)])
async def test_guesses_change_nothing_but_the_number_of_steps(llama: Load, sampling: SamplingParams) -> None:
    request = TokenRequest([*prompt(3, 12)] * 3, 60, sampling)
    plain, guessing = llama(), llama(prompt_lookup=4)
    assert await ids(guessing, request) == await ids(plain, request)
    info = guessing.info()
    assert info["generated_tokens"] == 60
    assert int(info["guessed_tokens"]) >= int(info["accepted_tokens"]) > 0
    assert int(info["steps"]) == int(plain.info()["steps"]) - int(info["accepted_tokens"])


@pytest.mark.parametrize(
    ("draft", "sampling"),
    [
        ("llama", GREEDY),
        ("gptneox", SamplingParams(temperature=0.3, seed=3)),
        pytest.param("llama", SamplingParams(temperature=0.3, seed=3), marks=pytest.mark.long),
        pytest.param("gptneox", GREEDY, marks=pytest.mark.long),
    ],
)
async def test_a_draft_model_changes_nothing_but_the_number_of_steps(
    llama: Load, draft: FamilyName, sampling: SamplingParams
) -> None:
    request = TokenRequest(prompt(3, 100), 60, sampling)  # more than a step: the draft model catches up in two
    plain, guessing = llama(), llama(draft=draft)
    assert await ids(guessing, request) == await ids(plain, request)
    info = guessing.info()
    guessed, accepted = int(info["guessed_tokens"]), int(info["accepted_tokens"])
    assert int(info["steps"]) == int(plain.info()["steps"]) - accepted
    if draft == "llama" and sampling == GREEDY:  # it guesses for itself, four tokens at a time
        assert accepted == guessed > 40
    else:
        assert guessed > accepted


async def test_a_draft_model_guesses_for_many_and_its_blocks_come_back(llama: Load) -> None:
    requests = [TokenRequest(prompt(i, 10 + 9 * i), TOKENS, GREEDY) for i in range(6)]
    plain, guessing = llama(), llama(draft="llama")
    expected = await asyncio.gather(*(ids(plain, request) for request in requests))
    found = await asyncio.gather(*(ids(guessing, request) for request in requests))
    assert sum(a == b for a, b in zip(found, expected, strict=True)) >= 5
    assert int(guessing.info()["accepted_tokens"]) > TOKENS
    guesser = guessing._batch._scheduler._guesser
    assert isinstance(guesser, DraftModel)
    guesser.check_integrity()
    assert guesser._pool.free == guesser._pool.size
