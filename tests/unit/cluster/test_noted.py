from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cluster import noted
from cluster.errors import ConfigError

DEAD = int(Path("/proc/sys/kernel/pid_max").read_text()) + 1


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(noted, "CLUSTERS", tmp_path / "nibble" / "clusters")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    return tmp_path / "nibble" / "clusters"


def write(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def note(address: str, pid: int) -> str:
    return json.dumps({"address": address, "pid": pid, "auth_mode": None})


def test_the_address_is_noted_while_the_cluster_runs(folder: Path) -> None:
    with noted.noted("127.0.0.1:6379"):
        assert noted.noted_address() == "127.0.0.1:6379"
    assert list(folder.iterdir()) == []
    with pytest.raises(ConfigError, match="no `nibble serve` runs on this machine"):
        noted.noted_address()


def test_the_note_goes_also_when_the_cluster_fails(folder: Path) -> None:
    with pytest.raises(KeyError), noted.noted("a:1"):
        raise KeyError
    assert list(folder.iterdir()) == []


def test_the_way_to_authenticate_is_noted_and_taken_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with noted.noted("a:1"):
        monkeypatch.delenv("RAY_AUTH_MODE")
        noted.noted_address()
        assert os.environ["RAY_AUTH_MODE"] == "token"
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # the user's own goes first
        noted.noted_address()
        assert os.environ["RAY_AUTH_MODE"] == "disabled"


def test_of_several_servers_all_are_named_and_each_deletes_its_own(folder: Path) -> None:
    write(folder, "1.json", note("other:2", os.getppid()))
    several = rf"several .*other:2 \(process {os.getppid()}\).*; say which one"
    with noted.noted("a:1"), pytest.raises(ConfigError, match=several):
        noted.noted_address()
    assert noted.noted_address() == "other:2"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"address": "a:1", "auth_mode": null}', "null", note("a:1", DEAD)])
def test_a_note_that_is_damaged_or_of_a_process_that_was_killed_is_none(folder: Path, text: str) -> None:
    write(folder, "1.json", text)
    with pytest.raises(ConfigError, match="no `nibble serve` runs"):
        noted.noted_address()
    with noted.noted("b:1"):
        assert noted.noted_address() == "b:1"
    assert list(folder.iterdir()) == [], "what has no owner is swept"


def test_without_a_home_that_can_be_written_there_is_no_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "clusters", Path("~nobody-has-this-name/clusters")):
        monkeypatch.setattr(noted, "CLUSTERS", place)
        with noted.noted("a:1"), pytest.raises(ConfigError, match="no `nibble serve` runs"):
            noted.noted_address()
