"""The bigdl engine's model with its bounds and its cache, on the demo artifacts, with the real libraries."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.errors import EngineError, InvalidRequestError
from cluster.families import FAMILY_NAMES, FamilyName
from cluster.machine.isa import REQUIRED_FLAGS, choose_isa, cpu_flags
from deployments.engines.agreement import relative_rms
from deployments.engines.base import Logits
from deployments.engines.bigdl.model import BLOCK, CachedModel, PrefillCancelledError, load_model
from tests.integration.engines.test_bigdl_engine import CONTEXT, Artifact, ids

# Float noise between evaluating tokens one by one and as a batch; unrelated logits are at about 1.4.
NOISE = 0.15

per_family = pytest.mark.parametrize("family", FAMILY_NAMES)


def fresh(demo_artifact: Artifact, family: FamilyName) -> CachedModel:
    return load_model(demo_artifact(family), threads=1, context=CONTEXT, isa=choose_isa())


@per_family
def test_rewound_and_diverging_prompts_give_the_logits_of_a_fresh_context(
    demo_artifact: Artifact, family: FamilyName
) -> None:
    base, other = ids(1, CONTEXT), ids(2, CONTEXT)
    prompts = [
        base[:100],
        base[:100],  # the same again
        base[:101],
        base[: 2 * BLOCK],  # a prefix that ends with a block
        base[:10],  # shorter than a block
        base[:120],
        base[: BLOCK + 3] + other[:60],  # diverges inside a block
        base[:BLOCK] + other[:60],  # diverges between blocks
        other[:1],
        base[:1],
        [0],
        [0, 0, 0],
        base,  # the whole context
        base[:40],
    ]
    used = fresh(demo_artifact, family)
    for number, prompt in enumerate(prompts):
        logits = used.prefill(prompt)[0].copy()
        model = fresh(demo_artifact, family)
        assert np.array_equal(logits, model.prefill(prompt)[0]), f"prompt {number}"
        model.close()
        for token in other[: min(3, CONTEXT - len(prompt))]:
            used.decode(token)
        used.check_integrity()
    used.close()


@per_family
def test_decoding_agrees_with_evaluating_at_once(demo_artifact: Artifact, family: FamilyName) -> None:
    model = fresh(demo_artifact, family)
    tokens = ids(3, 90)
    single = model.all_logits(tokens)
    assert single.shape == (90, 512)
    for count in (1, 2, BLOCK, BLOCK + 1, 90):
        assert relative_rms(model.prefill(tokens[:count])[0], single[count - 1]) < NOISE
    assert relative_rms(single[40], single[89]) > 3 * NOISE
    model.close()


@per_family
def test_every_build_that_this_cpu_runs_computes_the_same(demo_artifact: Artifact, family: FamilyName) -> None:
    tokens = ids(15, 40)
    results = {}
    for isa, flags in REQUIRED_FLAGS.items():
        if flags <= cpu_flags():
            model = load_model(demo_artifact(family), 1, CONTEXT, isa)
            results[isa] = model.prefill(tokens)[0].copy()
            model.close()
    for isa, logits in results.items():
        assert relative_rms(logits, results["avx"]) < NOISE, isa


@per_family
def test_the_cache_is_reused_in_blocks(demo_artifact: Artifact, family: FamilyName) -> None:
    model = fresh(demo_artifact, family)
    tokens = ids(4, 3 * BLOCK)
    assert [model.prefill(tokens)[1], model.prefill(tokens)[1], model.prefill(tokens[: 2 * BLOCK + 5])[1]] == [
        0,
        2 * BLOCK,
        2 * BLOCK,
    ]
    model.decode(9)
    assert model.prefill([*tokens[: 2 * BLOCK + 5], 9, 10])[1] == 2 * BLOCK
    model.close()


@per_family
def test_a_prefill_is_cancelled_between_blocks(demo_artifact: Artifact, family: FamilyName) -> None:
    model = fresh(demo_artifact, family)
    tokens = ids(5, 4 * BLOCK)
    answers = iter([False, False, True])
    with pytest.raises(PrefillCancelledError):
        model.prefill(tokens, lambda: next(answers))
    logits, reused = model.prefill(tokens)
    assert reused == 2 * BLOCK
    other = fresh(demo_artifact, family)
    assert np.array_equal(logits, other.prefill(tokens)[0])
    model.close()
    other.close()


@per_family
def test_what_the_library_must_not_see_is_refused(demo_artifact: Artifact, family: FamilyName) -> None:
    model = fresh(demo_artifact, family)
    for prompt in ([], [1] * (CONTEXT + 1), [5, -1], [5, 512]):
        with pytest.raises(InvalidRequestError) as caught:
            model.prefill(prompt)
        assert caught.value.field == "prompt"
    model.prefill([1] * CONTEXT)
    with pytest.raises(EngineError, match="context"):
        model.decode(1)
    model.close()


def test_a_character_may_be_spread_over_tokens(demo_artifact: Artifact) -> None:
    for family in ("llama", "starcoder"):
        model = load_model(demo_artifact(family), 1, 64, choose_isa())
        tokens = model.tokenize("é 日本".encode())
        assert model.detokenize(tokens).decode().strip().endswith("é 日本")
        assert len(model.detokenize(tokens[-1:])) < 3
        model.close()


def test_what_is_reused_is_not_evaluated_again(demo_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh(demo_artifact, "gptneox")
    tokens, evaluated = ids(14, 3 * BLOCK + 4), []
    evaluate = model._native.evaluate

    def noted(batch: list[int], past: int) -> Logits:
        evaluated.append((past, len(batch)))
        return evaluate(batch, past)

    monkeypatch.setattr(model._native, "evaluate", noted)
    model.prefill(tokens)
    model.prefill(tokens)
    whole, rest = [(start * BLOCK, BLOCK) for start in range(3)], (3 * BLOCK, 4)
    assert evaluated == [*whole, rest, rest]
    model.close()
