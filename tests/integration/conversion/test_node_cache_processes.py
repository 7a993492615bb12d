"""A node cache that several processes use: what one holds, the others leave, until it is dead."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cluster.artifacts.node_cache import NodeCache, Staging
from tests.made_artifact import fetch_and_release, made_manifest


def test_a_staging_folder_is_removed_by_the_next_only_when_its_process_is_dead(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from cluster.artifacts.node_cache import Staging\n" + (
        "print(Staging(Path(sys.argv[1]), 'a1').path, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    other = Path(process.stdout.readline().strip())
    with Staging(tmp_path, "a1") as staging:
        assert sorted(tmp_path.iterdir()) == sorted([other, staging])
    process.kill()  # -9: the folder stays
    process.communicate()
    assert other.is_dir()
    with Staging(tmp_path, "a2"), Staging(tmp_path, "a1"):
        assert not other.exists()
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_that_another_process_uses_is_not_removed(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path)
    fetch_and_release(cache, made_manifest())
    code = "import sys; from pathlib import Path; from cluster.artifacts.node_cache import NodeCache\n" + (
        "used = NodeCache(Path(sys.argv[1])).use('a1'); print('in use', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in use\n"
    assert not cache.remove("a1")
    process.kill()  # -9: the kernel lets go of the lock
    process.communicate()
    assert cache.remove("a1")
