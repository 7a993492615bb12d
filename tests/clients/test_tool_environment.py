from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.clients import tool_environment
from tests.clients.tool_environment import InstallError, made, run_client, run_installer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tool_environment.ONLINE, "XDG_CACHE_HOME", str(tmp_path))


def test_what_cannot_be_installed_is_skipped_with_the_installer_s_words_and_tried_again() -> None:
    def fail(folder: Path) -> None:
        folder.mkdir()
        run_installer([sys.executable, "-c", "raise SystemExit('no matching distribution')"])

    with pytest.raises(pytest.skip.Exception, match=r"^tool cannot be installed: no matching distribution$"):
        made("tool", "a==1", fail)
    assert made("tool", "a==1", lambda folder: folder.mkdir()).is_dir()


def test_an_environment_is_made_once_for_what_it_has() -> None:
    made_here: list[Path] = []

    def install(folder: Path) -> None:
        folder.mkdir()
        made_here.append(folder)

    first, again, other = (made("tool", content, install) for content in ("a==1", "a==1", "a==2"))
    assert first == again != other
    assert made_here == [first, other]


def test_an_environment_that_was_cut_while_it_was_made_is_made_anew() -> None:
    def cut(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made("tool", "a==1", cut)
    assert not (made("tool", "a==1", lambda folder: folder.mkdir()) / "half").exists()


def test_a_client_that_fails_is_no_reason_to_skip(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="refused by the server"):
        run_client([sys.executable, "-c", "raise SystemExit('refused by the server')"], tmp_path)
    with pytest.raises(InstallError):
        run_installer([sys.executable, "-c", "raise SystemExit(1)"])
