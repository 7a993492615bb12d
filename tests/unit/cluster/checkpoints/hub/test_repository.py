"""Checkpoints from the Hub, against a real HTTP server that answers as the Hub does."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from cluster.checkpoints.folder import checkpoint_digest
from cluster.checkpoints.hub.repository import HEADER_GUESS_BYTES
from cluster.checkpoints.sources import builtin_checkpoint, open_source
from cluster.errors import CheckpointError
from tests.hub_lookalike import HubLookalike
from tests.random_checkpoint import SHAPES, write_random_checkpoint
from tests.torch_files import write_torch_weights
from tests.unit.hub_client import SINGLE, WIDE, convert, go_offline, here, plan


@pytest.mark.parametrize("family", ["llama", "gptneox", "bloom", "starcoder"])
def test_a_plan_is_made_from_headers_and_is_that_of_the_folder(hub: HubLookalike, family: str) -> None:
    folder = builtin_checkpoint(family)
    hub.add("org/model", folder)
    planned, digest = plan("org/model", family)
    assert hub.served(SINGLE) <= HEADER_GUESS_BYTES
    local, local_digest, binary = here(folder, family)
    assert digest == local_digest
    assert planned.model_copy(update={"checkpoint": ""}) == local.model_copy(update={"checkpoint": ""})
    assert convert("org/model", planned) == binary
    assert hub.served(SINGLE) <= HEADER_GUESS_BYTES + (folder / SINGLE).stat().st_size


def test_the_headers_of_all_files_of_an_index_are_enough_to_plan(hub: HubLookalike, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", WIDE, shards=3)
    hub.add("org/model", folder)
    _, digest = plan("org/model")
    assert digest == here(folder)[1]
    weights = [path.name for path in folder.glob("*.safetensors")]
    assert [len(hub.asked(name)) for name in weights] == [1, 1, 1]
    assert all(0 < hub.served(name) <= HEADER_GUESS_BYTES for name in weights)
    assert sum(hub.served(name) for name in weights) < sum((folder / name).stat().st_size for name in weights) / 20


def test_a_header_longer_than_the_guess_takes_a_second_request(
    hub: HubLookalike, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.checkpoints.hub.repository.HEADER_GUESS_BYTES", 100)
    folder = write_random_checkpoint(tmp_path / "model", WIDE)
    hub.add("org/model", folder)
    _, digest = plan("org/model")
    assert digest == here(folder)[1]
    assert len(hub.asked(SINGLE)) == 2
    assert hub.served(SINGLE) < (folder / SINGLE).stat().st_size / 10


def test_a_refusal_names_the_repository_and_comes_before_any_weights(hub: HubLookalike, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", WIDE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 5}))
    commit = hub.add("org/model", folder)
    with pytest.raises(CheckpointError, match=rf"^checkpoint: org/model@{commit}: tensor .* is missing"):
        plan("org/model")
    assert hub.served(SINGLE) <= HEADER_GUESS_BYTES


def test_a_shard_downloads_only_the_files_it_needs(hub: HubLookalike, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", WIDE, shards=3)
    hub.add("org/model", folder)
    first, second, third = sorted(path.name for path in folder.glob("*.safetensors"))
    held = open_source("org/model").files([second])
    assert (held / second).read_bytes() == (folder / second).read_bytes()
    assert [hub.served(name) for name in (first, third)] == [0, 0]
    assert hub.served(second) == (folder / second).stat().st_size
    open_source("org/model").files([second])
    assert hub.served(second) == (folder / second).stat().st_size


def test_only_what_a_conversion_reads_is_asked_for(hub: HubLookalike, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", WIDE, shards=2)
    allowed = {path.name for path in folder.iterdir()}
    others = ("modeling_evil.py", "pytorch_model.bin", "consolidated.safetensors", "tf_model.h5", "tokenizer.py")
    for name in others:
        (folder / name).write_bytes(b"0" * 100_000)
    hub.add("org/model", folder)
    planned, _ = plan("org/model")
    convert("org/model", planned)
    asked = {request.file for request in hub.requests if "/resolve/" in request.path}
    assert asked == allowed


@pytest.mark.parametrize("shards", [1, 2])
def test_weights_that_are_there_as_pickles_alone_are_downloaded_whole_to_plan(
    hub: HubLookalike, tmp_path: Path, shards: int
) -> None:
    folder = write_random_checkpoint(tmp_path / "model", WIDE, shards=shards, write=write_torch_weights)
    weights = {path.name: path.stat().st_size for path in folder.glob("*.bin")}
    (folder / "pytorch_model.fp32.bin").write_bytes(b"0" * 1000)
    hub.add("org/model", folder)
    planned, digest = plan("org/model")
    assert {name: hub.served(name) for name in weights} == weights
    assert convert("org/model", planned) == here(folder)[2]
    assert digest == here(folder)[1]
    assert {name: hub.served(name) for name in weights} == weights
    assert not hub.asked("pytorch_model.fp32.bin", "HEAD")


def test_small_weights_that_git_holds_itself_are_downloaded_whole(
    hub: HubLookalike, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.hub_records.LFS_SUFFIXES", ())
    folder = write_random_checkpoint(tmp_path / "model", SHAPES["bloom"])
    hub.add("org/model", folder)
    assert plan("org/model")[1] == here(folder)[1]


def test_templates_in_a_folder_of_theirs_come_along(
    hub: HubLookalike, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "additional_chat_templates/tool_use.jinja"
    folder = write_random_checkpoint(tmp_path / "model", WIDE)
    (folder / name).parent.mkdir()
    (folder / name).write_text("{{ tools }}")
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    hub.add("org/model", folder)
    planned, digest = plan("org/model")
    assert name in planned.files
    assert digest == here(folder)[1]
    assert not hub.asked("rag.jinja")
    open_source("org/model").files([SINGLE])
    go_offline(monkeypatch)
    offline, offline_digest = plan("org/model")
    assert (offline.files, offline_digest) == (planned.files, digest)


def test_a_branch_is_pinned_to_its_commit_and_a_commit_asks_for_nothing(hub: HubLookalike, tmp_path: Path) -> None:
    old = write_random_checkpoint(tmp_path / "old", WIDE)
    new = write_random_checkpoint(tmp_path / "new", WIDE._replace(seed=2))
    old_commit = hub.add("org/model", old)
    source = open_source("org/model")
    assert source.pinned == f"org/model@{old_commit}"
    new_commit = hub.add("org/model", new)
    hub.add("org/model", old, revision="v1.0")
    with source.planning() as (folder, sha256):  # still what it was when it was opened
        assert checkpoint_digest(folder, sha256) == here(old)[1]
    assert open_source("org/model").pinned == f"org/model@{new_commit}"
    assert open_source("org/model@v1.0").pinned == f"org/model@{old_commit}"
    before = len(hub.requests)
    assert open_source(f"org/model@{old_commit}").pinned == f"org/model@{old_commit}"
    assert len(hub.requests) == before


@pytest.mark.parametrize("reset", [False, True])
def test_a_connection_cut_in_mid_file_is_taken_up(
    hub: HubLookalike, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reset: bool
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 20_000)  # what it goes back by at most
    folder = write_random_checkpoint(tmp_path / "model", WIDE)
    hub.add("org/model", folder)
    planned, _ = plan("org/model")
    hub.cut(SINGLE, after=300_000, times=2, reset=reset)
    assert convert("org/model", planned) == here(folder)[2]
    _, first, second, third = hub.asked(SINGLE)  # the header, then three connections
    assert first.range is None
    if reset:  # which may take from the client what it had not read yet
        assert 0 < second.begins < third.begins <= 600_000
        assert hub.served(SINGLE) < 2 * (folder / SINGLE).stat().st_size
    else:
        assert (second.begins, third.begins) == (300_000, 600_000)
        assert sum(request.bytes for request in (first, second, third)) == (folder / SINGLE).stat().st_size


def test_weights_damaged_on_their_way_are_downloaded_again_then_refused(
    hub: HubLookalike, tmp_path: Path, hub_home: Path
) -> None:
    folder = write_random_checkpoint(tmp_path / "model", WIDE)
    hub.add("org/model", folder)
    planned, _ = plan("org/model")
    content = bytearray((folder / SINGLE).read_bytes())
    content[-1] ^= 1
    (folder / SINGLE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"arrived with another sha256 than the Hub names, 4 times"):
        convert("org/model", planned)
    assert not list(hub_home.glob(f"**/{SINGLE}"))


@pytest.mark.parametrize("trouble", ["offline", "down", "limiting", "broken"])
@pytest.mark.parametrize("shards", [1, 3])
def test_what_is_cached_needs_no_hub(
    hub: HubLookalike,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    waits: list[float],
    caplog: pytest.LogCaptureFixture,
    trouble: str,
    shards: int,
) -> None:
    folder = write_random_checkpoint(tmp_path / "model", WIDE, shards=shards)
    commit = hub.add("org/model", folder)
    planned, digest = plan("org/model")
    binary = convert("org/model", planned)
    if trouble == "offline":
        go_offline(monkeypatch)
    elif trouble == "down":
        hub.stop()
    else:
        hub.fail(429 if trouble == "limiting" else 500, Retry_After="5")
    caplog.set_level(logging.WARNING)
    assert open_source("org/model").pinned == f"org/model@{commit}"
    again, same_digest = plan("org/model")
    assert same_digest == digest
    assert convert("org/model", again) == binary
    assert waits == []
    assert f"Going on with commit {commit}, the last that this node knows" in caplog.text


def test_a_cache_with_part_of_the_weights_says_what_is_missing_offline(
    hub: HubLookalike, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/model", write_random_checkpoint(tmp_path / "model", WIDE, shards=2))
    plan("org/model")
    go_offline(monkeypatch)
    with pytest.raises(CheckpointError, match=r"org/model@\w+ in the Hub cache of this node.*names model-0000"):
        plan("org/model")


def test_a_snapshot_of_the_hub_s_cache_is_a_folder_like_any_other(hub: HubLookalike, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", WIDE, shards=2)
    hub.add("org/model", folder)
    source = open_source("org/model")
    snapshot = source.files(path.name for path in folder.iterdir())
    assert all(path.is_symlink() for path in snapshot.iterdir())
    assert here(snapshot)[1:] == here(folder)[1:]


def test_what_the_hub_s_own_tools_downloaded_before_needs_no_hub(
    hub: HubLookalike, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_home: Path
) -> None:
    """As people fill a cache for machines without a network."""
    folder = write_random_checkpoint(tmp_path / "model", WIDE, shards=2)
    (folder / "README.md").write_text("read by nobody")
    hub.add("org/model", folder)
    snapshot_download("org/model", cache_dir=hub_home / "cache")
    go_offline(monkeypatch)
    planned, digest = plan("org/model")
    assert (digest, convert("org/model", planned)) == here(folder)[1:]


def test_content_that_repositories_share_in_the_hub_s_cache_is_known_by_its_etag(
    hub: HubLookalike, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_home: Path
) -> None:
    """huggingface_hub keeps what came through Xet under another hash, 64 hex digits too, and links the blob to it."""
    folder = write_random_checkpoint(tmp_path / "model", WIDE)
    hub.add("org/model", folder)
    planned, digest = plan("org/model")
    convert("org/model", planned)
    shared = hub_home / "cache" / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob = (open_source("org/model").files([SINGLE]) / SINGLE).resolve()
    blob.rename(shared)
    blob.symlink_to(shared)
    go_offline(monkeypatch)
    assert plan("org/model")[1] == digest


def test_a_cache_that_cannot_be_written_serves_what_it_has(
    hub: HubLookalike, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_random_checkpoint(tmp_path / "model", WIDE)
    hub.add("org/model", folder)
    planned, digest = plan("org/model")
    binary = convert("org/model", planned)
    monkeypatch.setattr("os.access", lambda *_: False)
    monkeypatch.setattr("cluster.checkpoints.hub.repository.WeakFileLock", None)
    again, same_digest = plan("org/model")
    assert same_digest == digest
    assert convert("org/model", again) == binary


def test_a_folder_s_digest_is_that_of_its_repository(hub: HubLookalike, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", WIDE, shards=2)
    copy = shutil.copytree(folder, tmp_path / "copy")
    hub.add("org/model", folder)
    assert plan("org/model")[1] == here(copy)[1] == checkpoint_digest(folder)
