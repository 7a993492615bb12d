"""The benchmark's own parts: a checkpoint it makes can be converted, and what it measures is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from cluster.checkpoints.weights import weight_files
from cluster.conversion.plan import plan_conversion
from cluster.conversion.shard import convert_shard
from cluster.families import FAMILY_NAMES, FamilyName
from tests.bench.make_checkpoint import write_checkpoint
from tests.default_checkpoints import mend_llama, write_default_checkpoint
from tests.random_checkpoint import Shape
from tests.random_tokenizer import byte_level_tokenizer

LAYERS = {"llama": 26, "gptneox": 16, "bloom": 2, "starcoder": 2}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_made_checkpoint_converts(family: FamilyName, tmp_path: Path) -> None:
    wide = 192 if family == "llama" else 256
    write_checkpoint(tmp_path / "made", Shape(family, layers=LAYERS[family], feed_forward=wide), files=3)
    assert len(weight_files(tmp_path / "made")) == 4
    plan = plan_conversion(tmp_path / "made", family)
    assert convert_shard(plan, 0).size == plan.bytes


@pytest.mark.parametrize(("family", "files"), [("llama", 33), ("gptneox", 2), ("bloom", 1), ("starcoder", 1)])
def test_a_default_checkpoint_in_small_has_the_files_of_the_full_one_and_converts(
    family: FamilyName, files: int, tmp_path: Path
) -> None:
    folder = write_default_checkpoint(tmp_path / "made", family, small=True)
    if family == "llama":
        mend_llama(folder)
    assert len(list(folder.glob("*.bin"))) == files
    plan = plan_conversion(folder, family)
    assert plan.engines == ("bigdl", "openvino")
    assert convert_shard(plan, 0).size == plan.bytes


@pytest.mark.parametrize("tokens", [300, 50254, 250680])
def test_a_byte_level_tokenizer_has_as_many_tokens_as_asked_for(tokens: int) -> None:
    made = Tokenizer.from_str(json.dumps(byte_level_tokenizer(tokens, ("<s>",), ("<end>",))))
    assert made.get_vocab_size() == tokens
    assert made.encode("<s><end>").ids == [0, tokens - 1]
