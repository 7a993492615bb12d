from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.checkpoints.sources import open_source
from cluster.config import ArtifactsConfig, parse_config
from cluster.errors import ConfigError
from cluster.machine.home import expanded, is_writable
from cluster.ray_cluster import token_settings

MODEL = {"name": "a", "family": "llama", "checkpoint": "builtin:llama"}


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # of which the system knows nothing


def test_a_home_is_put_in_the_place_of_its_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert expanded(Path("~/a"), "field") == Path("/home/somebody/a")
    assert expanded(Path("/a/~"), "field") == Path("/a/~")


@pytest.mark.usefixtures("homeless")
def test_where_no_home_is_known_the_setting_is_named() -> None:
    for make, field in (
        (ArtifactsConfig, "artifacts.cache_dir"),
        (lambda: parse_config({"models": [MODEL]}, "file"), "artifacts.cache_dir"),
        (lambda: parse_config({"models": [MODEL], "artifacts": {"cache_dir": "/a"}, "auth": {"api_keys_file": "~/k"}},
                              "file"), "auth.api_keys_file"),
        (lambda: open_source("~/a"), "checkpoint"),
        (lambda: open_source("~nobody-of-this-name/a"), "checkpoint"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"^{field}: found ~.* user 54321 has none\): set HOME, or"):
            make()
    config = parse_config({"models": [MODEL], "artifacts": {"cache_dir": "/a"}}, "file")
    assert config.artifacts.cache_dir == Path("/a")
    sent = config.model_dump(mode="json", exclude_defaults=True)
    assert parse_config(sent, "as the router gets it") == config


def test_a_folder_can_be_written_where_it_can_be_made(tmp_path: Path) -> None:
    assert is_writable(tmp_path)
    assert is_writable(tmp_path / "a" / "b")
    assert not is_writable(Path("/dev/null/a"))
    (tmp_path / "file").write_text("")
    assert not is_writable(tmp_path / "file")


def test_ray_s_token_is_in_a_folder_of_the_server_where_there_is_no_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert token_settings(tmp_path) == {}
    monkeypatch.setenv("HOME", "/dev/null")
    (file,) = token_settings(tmp_path).values()
    assert len(Path(file).read_text()) == 64
    assert Path(file).stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert token_settings(tmp_path) == {}
