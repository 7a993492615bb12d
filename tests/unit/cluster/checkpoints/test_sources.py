from __future__ import annotations

from pathlib import Path

import pytest

from cluster.checkpoints.sources import open_source
from cluster.errors import CheckpointError
from cluster.families import FAMILY_NAMES


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_builtin_checkpoints_are_small_folders(family: str) -> None:
    source = open_source(f"builtin:{family}")
    assert source.pinned == f"builtin:{family}"  # wherever a node has its demos
    folder = source.files([])
    assert (folder / "model.safetensors").is_file()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4_000_000


def test_a_folder_is_itself(tmp_path: Path) -> None:
    source = open_source(str(tmp_path))
    assert source.pinned == str(tmp_path)
    assert source.files(["any"]) == tmp_path
    with source.planning() as planning:
        assert planning == (tmp_path, {})


def test_a_relative_folder_is_pinned_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert open_source("model").pinned == str(tmp_path / "model")


def test_an_unknown_builtin_names_the_known() -> None:
    with pytest.raises(CheckpointError, match="no built-in 'gpt2'; there are bloom, gptneox, llama, starcoder"):
        open_source("builtin:gpt2")


@pytest.mark.parametrize("source", ["./missing", "/missing/folder", "missing", "a/b/c", "org/repo@", "a/b@../c"])
def test_what_is_no_folder_and_no_repository_says_what_is_allowed(source: str) -> None:
    with pytest.raises(CheckpointError, match="allowed are a folder"):
        open_source(source)


def test_a_repository_that_is_not_cached_offline_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="org/repo@v1 is not in the local Hub cache"):
        open_source("org/repo@v1")
