"""What a process leaves that was killed, and what the next one takes away."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.machine.owned_folders import owned_folder, sweep
from tests.integration.processes import ROOT

# Makes a folder, starts processes that belong to it, by their environment or by what they write, and others, and waits.
OWNER = """
import os, subprocess, sys
from cluster.machine.owned_folders import FOLDERS_VARIABLE, LOCK, owned_folder
with owned_folder(sys.argv[1]) as folder:
    sleep = ["sleep", "600"]
    environment = {**os.environ, FOLDERS_VARIABLE: f"{folder}:/tmp/nibble-other"}
    member = subprocess.Popen(sleep, env=environment, start_new_session=True)
    with open(folder / "log", "w") as log:
        writer = subprocess.Popen(sleep, stdout=log, start_new_session=True)
    with open(folder / "log") as log:
        reader = subprocess.Popen(sleep, stdin=log, start_new_session=True)
    with open(folder / LOCK, "r+") as lock:  # as another start has it, which looks for what is left
        looker = subprocess.Popen(sleep, stdin=lock, start_new_session=True)
    other = subprocess.Popen(sleep, env={**os.environ, "OTHER": str(folder)}, start_new_session=True)
    started = [member, writer, reader, looker, other]
    print(folder, *(process.pid for process in started), flush=True)
    sys.stdin.read()
    for process in started:
        process.kill()
"""


@contextmanager
def owner(parent: Path) -> Iterator[tuple[subprocess.Popen[str], Path, list[int], list[int]]]:
    """The process, its folder, and the ids of what it has started: what belongs to the folder, and the others."""
    command = [sys.executable, "-c", OWNER, str(parent)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder, *ids = process.stdout.readline().split()
        started = [int(id) for id in ids]
        try:
            yield process, Path(folder), started[:2], started[2:]
        finally:
            process.kill()
            for pid in started:
                if runs(pid):
                    os.kill(pid, signal.SIGKILL)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_process_removes_its_folder(tmp_path: Path) -> None:
    with owned_folder(tmp_path) as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "file").write_text("")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_leaves_is_swept_and_nothing_else(tmp_path: Path) -> None:
    with owner(tmp_path) as (killed, left, members, others), owner(tmp_path) as (_, living, living_members, _):
        sweep([tmp_path])
        assert left.is_dir(), "its process lives"
        assert all(map(runs, members))
        killed.kill()
        killed.wait()
        assert left.is_dir()
        assert all(map(runs, members))
        foreign, link = tmp_path / "nibble-without-an-owner", tmp_path / "nibble-link"
        foreign.mkdir()
        link.symlink_to(left)
        sweep([tmp_path / "nowhere", tmp_path])
        assert not left.exists()
        assert not any(map(runs, members))
        assert all(map(runs, others)), "they only read, look for what is left, or know the folder's name"
        assert living.is_dir()
        assert all(map(runs, living_members))
        assert foreign.is_dir()
        assert link.is_symlink()


def test_a_folder_of_another_user_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with owner(tmp_path) as (killed, left, members, _):
        killed.kill()
        killed.wait()
        monkeypatch.setattr(os, "getuid", lambda: left.stat().st_uid + 1)
        sweep([tmp_path])
        assert left.is_dir()
        assert all(map(runs, members))


def test_a_folder_that_is_still_written_to_goes_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove, tries = shutil.rmtree, []

    def in_vain_at_first(folder: Path, ignore_errors: bool) -> None:
        tries.append(folder)
        if len(tries) > 2:
            remove(folder, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", in_vain_at_first)
    with owned_folder(tmp_path) as folder:
        pass
    assert not folder.exists()
    assert len(tries) == 3
