"""What the Hub may answer but what was asked for, from a real HTTP server that answers as the Hub does."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from cluster.checkpoints.hub.repository import HEADER_GUESS_BYTES, resolve_revision
from cluster.checkpoints.sources import open_source
from cluster.errors import CheckpointError
from cluster.families import FAMILIES, FAMILY_NAMES, FamilyName
from tests.hub_lookalike import HubLookalike
from tests.random_checkpoint import SHAPES, write_random_checkpoint
from tests.unit.hub_client import SINGLE, WIDE, convert, go_offline, here, plan, point_at


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "says unauthorized .401.: there is no such repository, or it is private, or the token is wrong"),
        (403, "refuses .403.: .*check the rights of the token in HF_TOKEN"),
        (404, "has no such repository: check the name"),
        (429, "limits the rate of requests .429., after 4 attempts: try again later, set HF_TOKEN"),
        (500, "has an error of its own .500., after 4 attempts: try again later"),
        (503, "has an error of its own .503., after 4 attempts"),
    ],
)
@pytest.mark.parametrize("path", ["/api/models/org/model", SINGLE, "tokenizer.json"])
def test_every_refusal_names_repository_and_what_to_do(
    hub: HubLookalike, tmp_path: Path, status: int, message: str, path: str
) -> None:
    hub.add("org/model", write_random_checkpoint(tmp_path / "model", SHAPES["bloom"]), revision="v1")
    hub.fail(status, path=path)
    revision = r"@\w+: " + path if "." in path else r"@\w+"
    if path == "tokenizer.json":  # huggingface_hub's own download: its attempts are not counted
        message = message.replace("after 4", r"after \d")
    with pytest.raises(CheckpointError, match=rf"checkpoint: org/model{revision}:? .*{message}"):
        plan("org/model@v1")


def test_a_gated_repository_says_how_to_get_in(hub: HubLookalike, tmp_path: Path) -> None:
    hub.add("org/model", write_random_checkpoint(tmp_path / "model", SHAPES["bloom"]))
    hub.repositories["org/model"].gated = True
    with pytest.raises(CheckpointError, match=r"org/model@.* is gated .403.: accept its conditions .* set HF_TOKEN"):
        plan("org/model")


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("status", [401, 404])
def test_a_missing_default_names_repositories_that_fit(hub: HubLookalike, family: FamilyName, status: int) -> None:
    row = FAMILIES[family]
    hub.fail(status)
    with pytest.raises(CheckpointError) as refusal:
        open_source(row.default_repo)
    text = str(refusal.value)
    assert text.startswith(f"checkpoint: {row.default_repo}: the Hub at")
    assert f"({status})" in text or "no such repository" in text
    assert f"It is the default of family {family}; others that fit: {', '.join(row.alternatives)}." in text
    assert text.endswith(f"--model-family {family} --repo-id-or-model-path {row.alternatives[0]}")
    assert "\n" not in text


def test_a_missing_repository_revision_and_file_are_told_apart(hub: HubLookalike, tmp_path: Path) -> None:
    hub.add("org/model", write_random_checkpoint(tmp_path / "model", SHAPES["bloom"]))
    with pytest.raises(CheckpointError, match=r"org/other: .* has no such repository: check the name"):
        plan("org/other")
    with pytest.raises(CheckpointError, match=r"org/model@v9: the repository has no such revision; name a branch"):
        plan("org/model@v9")
    with pytest.raises(CheckpointError, match=r"org/model@\w+: other.safetensors: no such file at this revision"):
        open_source("org/model").files(["other.safetensors"])
    (tmp_path / "empty").mkdir()
    hub.add("org/empty", tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"org/empty@\w+: not a checkpoint: it has no config.json"):
        plan("org/empty")


def test_a_limit_is_waited_for_as_long_as_the_hub_says(hub: HubLookalike, tmp_path: Path, waits: list[float]) -> None:
    folder = write_random_checkpoint(tmp_path / "model", SHAPES["bloom"])
    hub.add("org/model", folder)
    hub.fail(429, times=2, Retry_After="7")
    assert plan("org/model")[1] == here(folder)[1]
    assert waits == [7, 7]


def test_a_limit_in_the_hub_s_own_header_is_understood(hub: HubLookalike, tmp_path: Path, waits: list[float]) -> None:
    hub.add("org/model", write_random_checkpoint(tmp_path / "model", SHAPES["bloom"]))
    hub.fail(429, times=1, RateLimit='"api";r=0;t=9')
    plan("org/model")
    assert waits == [9]


def test_a_limit_that_lasts_too_long_is_told_at_once(hub: HubLookalike, waits: list[float]) -> None:
    hub.fail(429, Retry_After="3600")
    with pytest.raises(CheckpointError, match=r"after 1 attempts: try again in 3600 s"):
        plan("org/model")
    assert waits == []


def test_server_errors_are_tried_again(hub: HubLookalike, tmp_path: Path, waits: list[float]) -> None:
    folder = write_random_checkpoint(tmp_path / "model", SHAPES["bloom"])
    hub.add("org/model", folder)
    hub.fail(503, times=2)
    hub.fail(500, times=1, path=SINGLE)
    assert plan("org/model")[1] == here(folder)[1]
    assert waits == [1, 2, 1]


def test_a_header_whose_connection_is_cut_is_asked_for_again(hub: HubLookalike, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", WIDE)
    hub.add("org/model", folder)
    hub.cut(SINGLE, after=10, times=2)
    assert plan("org/model")[1] == here(folder)[1]


def test_a_connection_that_is_always_cut_ends_in_an_error(hub: HubLookalike, tmp_path: Path) -> None:
    hub.add("org/model", write_random_checkpoint(tmp_path / "model", WIDE))
    hub.cut(SINGLE, after=10, times=1000)
    with pytest.raises(CheckpointError, match=r"org/model@\w+: model.safetensors .* cannot be reached"):
        plan("org/model")


def test_offline_without_a_cache_says_so(hub: HubLookalike, monkeypatch: pytest.MonkeyPatch) -> None:
    go_offline(monkeypatch)
    for source in ("org/model", f"org/model@{'0' * 40}"):
        with pytest.raises(CheckpointError, match=r"org/model.* is not in the local Hub cache .*HF_HUB_OFFLINE is set"):
            plan(source)
    assert hub.requests == []


def test_an_unreachable_hub_without_a_cache_says_so(hub: HubLookalike) -> None:
    hub.stop()
    with pytest.raises(
        CheckpointError, match=r"org/model is not in .* cannot be reached \(.*check the network and HF_E"
    ):
        plan("org/model")


def test_a_closed_port_is_unreachable(monkeypatch: pytest.MonkeyPatch, hub: HubLookalike) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(CheckpointError, match=r"cannot be reached"):
            plan("org/model")


def test_a_server_that_is_no_hub_is_told_apart(monkeypatch: pytest.MonkeyPatch, hub: HubLookalike) -> None:
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url + "/elsewhere")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: json.loads("<html>"))
    with pytest.raises(CheckpointError, match=r"did not answer as the Hub does .*check HF_ENDPOINT"):
        plan("org/model")


def test_a_full_disk_says_where(hub: HubLookalike, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/model", write_random_checkpoint(tmp_path / "model", SHAPES["bloom"]))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cluster.checkpoints.hub.repository.hf_hub_download", full)
    with pytest.raises(CheckpointError, match=r"cannot be stored in .*cache: No space left on device"):
        plan("org/model")


@pytest.mark.parametrize("cdn", [False, True])
def test_the_token_goes_to_the_hub_and_nowhere_else(
    hub_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cdn: bool
) -> None:
    folder = write_random_checkpoint(tmp_path / "model", WIDE)
    with HubLookalike(token="hf_secret", cdn=cdn) as hub:
        point_at(hub, monkeypatch)
        hub.add("org/model", folder)
        with pytest.raises(CheckpointError, match=r"unauthorized .401."):
            plan("org/model")
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        with pytest.raises(CheckpointError, match=r"unauthorized .401.") as refused:
            plan("org/model")
        assert "hf_wrong" not in str(refused.value)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        planned, _ = plan("org/model")
        assert hub.served(SINGLE) <= HEADER_GUESS_BYTES
        assert convert("org/model", planned) == here(folder)[2]
        assert len(hub.cdn_requests) == (2 if cdn else 0)
        assert [request.authorization for request in hub.cdn_requests if request.authorization] == []


def test_the_token_file_of_the_hub_s_home_is_read(
    hub_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (hub_home / "token").write_text("hf_filed")
    with HubLookalike(token="hf_filed") as hub:
        point_at(hub, monkeypatch)
        commit = hub.add("org/model", write_random_checkpoint(tmp_path / "model", SHAPES["bloom"]))
        assert resolve_revision("org/model", "main") == commit
