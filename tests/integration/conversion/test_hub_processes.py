"""Processes that download from a Hub: one that is killed, and several at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.hub_lookalike import HubLookalike
from tests.random_checkpoint import write_random_checkpoint
from tests.unit.hub_client import SINGLE, WIDE


@pytest.fixture
def hub() -> Iterator[HubLookalike]:
    with HubLookalike() as hub:
        yield hub


def test_a_download_whose_process_was_killed_is_taken_up(hub: HubLookalike, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "model", WIDE)
    commit = hub.add("org/model", folder)
    program = (
        "import os, signal, sys, huggingface_hub.constants as constants\n"
        "from cluster.checkpoints.hub import download, repository as hub\n"
        "constants.DOWNLOAD_CHUNK_SIZE = 20_000\n"
        "class Dying(download.HashingFile):\n"
        "    def write(self, data):\n"
        "        if self.tell() >= int(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return super().write(data)\n"
        "download.HashingFile = Dying\n"
        f"print(hub.download('org/model', '{commit}', ['{SINGLE}']))"
    )
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}

    def run(die_at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, str(die_at)]
        return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)

    killed, ended = run(300_000), run(1 << 40)
    assert killed.returncode == -signal.SIGKILL
    assert (Path(ended.stdout.strip()) / SINGLE).read_bytes() == (folder / SINGLE).read_bytes()
    first, second = hub.asked(SINGLE)
    assert (first.range, second.begins) == (None, 300_000)
    assert not list((tmp_path / "home").glob("**/*.incomplete"))


def test_processes_of_a_node_download_a_file_once(hub: HubLookalike, tmp_path: Path) -> None:
    """Real processes, whose settings come from the environment alone."""
    folder = write_random_checkpoint(tmp_path / "model", WIDE)
    hub.add("org/model", folder)
    program = (
        f"from cluster.checkpoints.sources import open_source; print(open_source('org/model').files(['{SINGLE}']))"
    )
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", program]

    def run(_: int) -> str:
        child = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=True)
        return child.stdout.strip()

    with ThreadPoolExecutor(3) as pool:
        (held,) = set(pool.map(run, range(3)))
    assert Path(held).is_relative_to(tmp_path / "home")
    assert (Path(held) / SINGLE).read_bytes() == (folder / SINGLE).read_bytes()
    assert hub.served(SINGLE) == (folder / SINGLE).stat().st_size
