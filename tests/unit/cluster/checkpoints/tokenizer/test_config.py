from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from cluster.checkpoints.sources import builtin_checkpoint
from cluster.checkpoints.tokenizer.config import AddedToken, configured_ids, read_tokenizer_config
from cluster.errors import CheckpointError


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_folder_without_such_files_names_nothing(tmp_path: Path) -> None:
    assert read_tokenizer_config(tmp_path) == ({}, {}, None, {}, None)
    assert configured_ids(tmp_path, "eos") == ()


def test_special_tokens_map_counts_where_tokenizer_config_has_no_added_tokens_decoder(tmp_path: Path) -> None:
    config = {"bos_token": "<a>", "eos_token": {"content": "<b>", "lstrip": False}, "unk_token": "", "pad_token": None}
    names = {"bos_token": "<c>", "unk_token": {"content": ""}, "additional_special_tokens": ["<d>"]}
    write(tmp_path, tokenizer_config=config, special_tokens_map=names)
    expected = {"bos_token": "<c>", "eos_token": "<b>", "pad_token": None}
    assert read_tokenizer_config(tmp_path).names == expected
    write(tmp_path, tokenizer_config=config | {"added_tokens_decoder": {}})
    assert read_tokenizer_config(tmp_path).names == expected | {"bos_token": "<a>"}


def test_added_tokens_of_both_files(tmp_path: Path) -> None:
    entries = {"7": {"content": "<x>", "special": True, "rstrip": True, "normalized": False}}
    write(tmp_path, tokenizer_config={"added_tokens_decoder": entries, "eos_token": "<z>"})
    write(tmp_path, added_tokens={"<y>": 8, "<z>": 9, "<old>": 7})
    assert read_tokenizer_config(tmp_path).added == {
        7: AddedToken("<x>", special=True, rstrip=True),
        8: AddedToken("<y>", special=False),
        9: AddedToken("<z>", special=True),
    }


def test_the_ids_of_generation_config_come_first_and_numbers_alone_are_ids(tmp_path: Path) -> None:
    write(tmp_path, generation_config={"eos_token_id": [5, True, "6", 7]}, config={"eos_token_id": 2})
    assert configured_ids(tmp_path, "eos") == (5, 7, 2)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, None),
        ("a", "a"),
        ([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}], "d"),
        (
            [{"name": "tool'use", "template": "t"}],
            "{{ raise_exception('tokenizer_config.json has no chat template named default, only tooluse') }}",
        ),
    ],
)
def test_the_template_for_conversations(template: Any, expected: str | None, tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config={"chat_template": template})
    assert read_tokenizer_config(tmp_path).template == expected
    (tmp_path / "chat_template.jinja").write_text("file")
    assert read_tokenizer_config(tmp_path).template == "file"
    assert read_tokenizer_config(tmp_path).tool_template is None


def test_the_template_for_conversations_with_tools(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    write(tmp_path, tokenizer_config={"chat_template": templates})
    found = read_tokenizer_config(tmp_path)
    assert (found.template, found.tool_template) == ("d", "t")
    write(tmp_path, tokenizer_config={"chat_template": templates[:1]})
    assert read_tokenizer_config(tmp_path).tool_template is None


def test_templates_with_files_of_their_own(tmp_path: Path) -> None:
    """As transformers' `save_pretrained` writes them, and reads them before those of tokenizer_config.json."""
    write(tmp_path, tokenizer_config={"chat_template": [{"name": "tool_use", "template": "old"}]})
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("t")
    found = read_tokenizer_config(tmp_path)
    assert found.template == "{{ raise_exception('the checkpoint has no chat template named default, only tool_use') }}"
    assert found.tool_template == "t"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xef\xbb\xbfd")
    found = read_tokenizer_config(tmp_path)
    assert (found.template, found.tool_template) == ("d", "t")
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"tool_use\.jinja: cannot be read as UTF-8"):
        read_tokenizer_config(tmp_path)


def test_templates_are_those_that_transformers_reads(tmp_path: Path) -> None:
    reference = AutoTokenizer.from_pretrained(builtin_checkpoint("llama"))
    reference.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    reference.save_pretrained(tmp_path)
    found = read_tokenizer_config(tmp_path)
    assert (found.template, found.tool_template) == ("{{ messages }}", "{{ tools }}")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("tokenizer_config", [], "found a JSON list"),
        ("tokenizer_config", {"bos_token": 1}, "bos_token: found 1, allowed is a text"),
        ("special_tokens_map", {"eos_token": {"content": ["a"]}}, "eos_token: found"),
        ("tokenizer_config", {"chat_template": 5}, "chat_template: found 5"),
        ("tokenizer_config", {"chat_template": [{"name": "default", "template": {}}]}, "chat_template: found {}"),
        ("tokenizer_config", {"chat_template": [{"name": "tool_use", "template": 5}]}, "chat_template: found 5"),
        ("tokenizer_config", {"added_tokens_decoder": ["a"]}, "added_tokens_decoder: found"),
        ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder: found 'x'"),
        ("tokenizer_config", {"added_tokens_decoder": {"1": {"special": True}}}, "added_tokens_decoder: found '1'"),
        ("added_tokens", {"a": "1"}, "found id '1' of 'a'"),
        ("added_tokens", {"a": -1}, "found id -1 of 'a'"),
    ],
)
def test_what_has_another_form_is_refused_and_named(name: str, content: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{name}\.json: {why}"):
        read_tokenizer_config(write(tmp_path, **{name: content}))


def test_a_file_that_recurses_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"a":' * 100_000)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: not JSON"):
        read_tokenizer_config(tmp_path)


def test_a_template_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: cannot be read as UTF-8"):
        read_tokenizer_config(tmp_path)
