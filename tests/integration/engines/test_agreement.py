"""How often the INT4 demo models predict the token that transformers predicts in fp32 (tests/reference/agreement)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.families import FAMILY_NAMES, FamilyName
from cluster.machine.isa import choose_isa
from deployments.engines.bigdl.model import load_model

REFERENCE = Path(__file__).parents[2] / "reference" / "agreement"


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_int4_agrees_with_fp32_on_at_least_nine_of_ten_next_tokens(
    family: FamilyName, demo_artifact: Callable[[FamilyName], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    reference = json.loads((REFERENCE / f"{family}.json").read_text())
    model = load_model(demo_artifact(family), threads=1, context=512, isa=choose_isa())
    predicted = model.all_logits(reference["input_ids"]).argmax(axis=1).tolist()
    model.close()
    pairs = list(zip(predicted, reference["greedy_next"], strict=True))
    agreement = sum(found == expected for found, expected in pairs) / len(pairs)
    with capsys.disabled():
        print(f"\n{family}: INT4 and fp32 agree on {agreement:.1%} of {len(pairs)} next tokens")
    assert agreement >= 0.9
