from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from cluster.checkpoints.folder import (
    check_companions,
    check_family,
    check_links,
    checkpoint_digest,
    companion_files,
    read_config,
)
from cluster.checkpoints.sources import open_source
from cluster.checkpoints.weights import weight_sources
from cluster.errors import CheckpointError
from cluster.families import FAMILY_NAMES, FamilyName
from tests.random_checkpoint import LFS_POINTER, SHAPES, write_random_checkpoint
from tests.torch_files import write_torch_weights


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(CheckpointError, match="not a folder; allowed is a Hugging Face checkpoint folder"):
            read_config(path)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a checkpoint: it has no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not JSON"), ("[1]", "found a JSON list"), ("\xff", "not JSON"), ("\xef\xbb\xbf{", "not JSON")],
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
    content = bytearray((checkpoint / name).read_bytes())
    content[-3] ^= 1
    (checkpoint / name).write_bytes(content)
    assert checkpoint_digest(checkpoint) != digest


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_damaged_bin_is_refused_with_its_tensor(shards: int, share: float, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(
        tmp_path / "checkpoint", SHAPES["bloom"], shards=shards, write=write_torch_weights
    )
    digest, sources = checkpoint_digest(checkpoint), list(weight_sources(checkpoint).values())
    source = sources[int(share * len(sources))]
    damage(checkpoint / source.file, source.offset + 100)
    with pytest.raises(CheckpointError) as refusal:
        checkpoint_digest(checkpoint)
    where = re.escape(f"{checkpoint / source.file}: tensor {source.name}")
    assert re.match(rf"{where} is damaged: .* CRC-32 \w{{8}}, the file says \w{{8}}: download", str(refusal.value))
    # What the Hub has vouched for is not read.
    known = dict.fromkeys((source.file for source in sources), "0" * 64)
    assert checkpoint_digest(checkpoint, known) != digest


def damage(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "merges.txt", "tokenizer.model"]
)
def test_a_file_that_git_lfs_only_points_to_is_named(name: str, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", SHAPES["bloom"])
    (checkpoint / name).write_text(LFS_POINTER)
    with pytest.raises(
        CheckpointError, match=rf"{name}: found a Git LFS pointer, .*: run 'git lfs pull' in the folder"
    ):
        check_companions(checkpoint)


@pytest.mark.parametrize(
    "name", ["generation_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "tokenizer.json"]
)
@pytest.mark.parametrize("content", [b'{"a": 1', b"\xef\xbb\xbf{", b"[]", b"{\xff}", b"\xff\xfe{\0}\0"])
def test_json_that_is_broken_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", SHAPES["bloom"])
    check_companions(checkpoint)
    (checkpoint / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: (not JSON|found a JSON list|found UTF-16)") as refusal:
        check_companions(checkpoint)
    assert "\n" not in str(refusal.value)


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


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "tokenizer.json", "vocab.json", "additional_chat_templates/tool_use.jinja"]
)
def test_a_link_that_leaves_the_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", SHAPES["bloom"])
    secret = tmp_path / "secret"
    secret.write_text("{}")
    check_links(checkpoint)
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match=rf"{name}: found a link to {secret}, outside of the checkpoint"):
        check_links(checkpoint)
    with pytest.raises(CheckpointError, match="outside of the checkpoint"), open_source(str(checkpoint)).planning():
        pass
    (checkpoint / "kept").write_text("{}")
    (checkpoint / name).unlink()
    (checkpoint / name).symlink_to(checkpoint / "kept")
    check_links(checkpoint)


def test_a_folder_of_templates_that_is_a_link_out_of_the_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", SHAPES["bloom"])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "tool_use.jinja").write_text("secret")
    (checkpoint / "additional_chat_templates").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match=r"tool_use\.jinja: found a link to .*, outside of the checkpoint"):
        check_links(checkpoint)


def test_the_hub_s_cache_links_to_its_blobs(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "models--org--name" / "snapshots" / "abc", SHAPES["bloom"])
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir()
    (checkpoint / "tokenizer.json").rename(blobs / "123")
    (checkpoint / "tokenizer.json").symlink_to("../../blobs/123")
    check_links(checkpoint)
