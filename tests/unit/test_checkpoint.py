from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cluster.checkpoint import check_family, checkpoint_digest, companion_files, read_config
from cluster.errors import CheckpointError
from cluster.families import FAMILY_NAMES, FamilyName
from tests.random_checkpoint import SHAPES, write_random_checkpoint


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(CheckpointError, match="not a folder; allowed is a Hugging Face checkpoint folder"):
            read_config(path)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a checkpoint: it has no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not JSON"), ("[1]", "found a JSON list"), ("\xff", "not JSON")]
)
def test_a_config_that_is_no_json_object_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
        read_config(tmp_path)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_santacoder_in_its_first_form_is_told_where_the_other_is(family: FamilyName, tmp_path: Path) -> None:
    config = {"architectures": ["GPT2LMHeadCustomModel"], "model_type": "gpt2"}
    message = r"found GPT2LMHeadCustomModel; family \w+ allows .*; bigcode/gpt_bigcode-santacoder has .*: take that"
    with pytest.raises(CheckpointError, match=message):
        check_family(tmp_path, config, family)


def test_of_a_model_type_that_contradicts_the_architecture_the_model_type_is_named(tmp_path: Path) -> None:
    config = {"architectures": ["BloomForCausalLM"], "model_type": "gpt_neox"}
    with pytest.raises(CheckpointError, match=r"model_type: found 'gpt_neox'; family bloom allows bloom; this is fam"):
        check_family(tmp_path, config, "bloom")
    check_family(tmp_path, config, "gptneox")


def test_companion_files_are_config_and_tokenizer_as_far_as_present(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", SHAPES["bloom"])
    (checkpoint / "README.md").touch()
    (checkpoint / "modeling_evil.py").touch()
    assert companion_files(checkpoint) == ("config.json", "tokenizer.json", "tokenizer_config.json")


def test_digest_is_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    first = write_random_checkpoint(tmp_path / "first", SHAPES["bloom"], shards=2)
    digest = checkpoint_digest(first)
    second = tmp_path / "second"
    shutil.copytree(first, second)
    (second / "README.md").write_text("not used")
    assert checkpoint_digest(second) == digest
    assert len(digest) == 64


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model-00002-of-00002.safetensors"])
def test_digest_changes_with_every_file_that_is_used(name: str, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", SHAPES["bloom"], shards=2)
    digest = checkpoint_digest(checkpoint)
    with (checkpoint / name).open("ab") as file:
        file.write(b" ")
    assert checkpoint_digest(checkpoint) != digest


def test_digest_changes_where_content_moves_between_files(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", SHAPES["bloom"])
    (checkpoint / "merges.txt").write_text("ab")
    digest = checkpoint_digest(checkpoint)
    (checkpoint / "merges.txt").rename(checkpoint / "vocab.json")
    assert checkpoint_digest(checkpoint) != digest


def test_digest_of_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match="no weights"):
        checkpoint_digest(tmp_path)
