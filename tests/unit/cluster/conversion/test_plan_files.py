"""The small files beside a checkpoint's weights: with a byte order mark, broken, or only Git LFS's pointers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.checkpoints.folder import read_companion
from cluster.config import ArtifactsConfig
from cluster.conversion.plan import plan_conversion
from cluster.conversion.steps import plan_wanted
from cluster.conversion.wanted import Wanted
from cluster.errors import CheckpointError
from deployments.generation.text import Tokenizer
from deployments.records import Conversation, Message
from tests.random_checkpoint import LFS_POINTER, SHAPES, write_random_checkpoint

MARK = b"\xef\xbb\xbf"
INDEX = "model.safetensors.index.json"
JSON_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "added_tokens.json",
    INDEX,
)


@pytest.fixture
def complete(tmp_path: Path) -> Path:
    """A bloom with every file that a checkpoint may have beside two files of weights."""
    folder = write_random_checkpoint(tmp_path / "checkpoint", SHAPES["bloom"], shards=2)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    (folder / "added_tokens.json").write_text(json.dumps({"<|endoftext|>": 0}))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return folder


def test_a_byte_order_mark_changes_nothing_and_the_artifact_has_none(complete: Path, tmp_path: Path) -> None:
    plan = plan_conversion(complete, "bloom")
    files = {name: (complete / name).read_bytes() for name in plan.files}
    conversation = Conversation((Message("user", "what"),))
    ids = Tokenizer(complete).encode_conversation(conversation)
    for name in (*JSON_FILES, "chat_template.jinja"):
        (complete / name).write_bytes(MARK + (complete / name).read_bytes())
    marked = plan_conversion(complete, "bloom")
    assert (marked.head, marked.tensors, marked.files) == (plan.head, plan.tensors, plan.files)
    tokenizer = Tokenizer(complete)
    assert tokenizer.encode_conversation(conversation) == ids
    assert tokenizer.eos_ids == {0, 2, 5}
    wanted = Wanted(source=str(complete), family="bloom", quantization="q4_0")
    config = ArtifactsConfig(cache_dir=tmp_path / "cache")
    config.cache_dir.mkdir()
    assert plan_wanted(wanted, config).files == files


def test_a_binary_file_that_begins_with_those_bytes_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(MARK + b"a")
    assert read_companion(tmp_path / "tokenizer.model") == MARK + b"a"


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("content", [b"", b'{"a": 1', MARK + b'{"a": 1', "{}".encode("utf-16"), b"[1]"])
def test_broken_json_is_one_line_that_names_the_file(name: str, content: bytes, complete: Path) -> None:
    (complete / name).write_bytes(content)
    with pytest.raises(CheckpointError) as refusal:
        plan_conversion(complete, "bloom")
    assert str(refusal.value).startswith(f"{complete / name}: ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", [*JSON_FILES, "chat_template.jinja", "model-00002-of-00002.safetensors"])
def test_a_git_lfs_pointer_is_named_as_what_it_is(name: str, complete: Path) -> None:
    (complete / name).write_text(LFS_POINTER)
    with pytest.raises(CheckpointError) as refusal:
        plan_conversion(complete, "bloom")
    assert str(refusal.value).startswith(f"{complete / name}: found a Git LFS pointer, not the file")


def test_a_template_that_cannot_be_read_is_named(complete: Path) -> None:
    for content, words in ((b"\xff", "cannot be read as UTF-8"), ("a".encode("utf-16"), "found UTF-16")):
        (complete / "chat_template.jinja").write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"chat_template\.jinja: {words}"):
            plan_conversion(complete, "bloom")
