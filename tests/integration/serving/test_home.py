"""A user without a name and a home, as containers have them; and a home that cannot be written."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator

import httpx
import pytest

from cluster.ray_cluster import free_ports
from tests.integration.processes import NAMELESS, ROOT, Sandbox, assert_ends_cleanly, sandbox, serving

CONFIG = """
artifacts: {{cache_dir: {}}}
models:
- {{name: llama, family: llama, checkpoint: 'builtin:llama', threads: 1}}
"""


@pytest.fixture
def homeless() -> Iterator[Sandbox]:
    if subprocess.run([*NAMELESS, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip(f"this system does not allow user namespaces: {' '.join(NAMELESS)} fails")
    with sandbox(nameless=True) as found:
        yield found


def test_without_a_home_what_needs_none_works_and_the_rest_says_what_to_set(homeless: Sandbox) -> None:
    assert homeless.run("--help").returncode == 0
    status = homeless.run("status")
    assert (status.returncode, status.stderr.count("\n")) == (1, 1)
    assert status.stderr.startswith("nibble: no `nibble serve` runs on this machine")
    output = str(homeless.home / "out")
    for command in (["convert", "builtin:llama", "--family", "llama", "--output", output], ["serve"]):
        refused = homeless.run(*command)
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1), refused.stderr
        assert refused.stderr.startswith("nibble: artifacts.cache_dir: found ~/.cache/nibble, but no home folder")
        assert "set HOME" in refused.stderr


@pytest.mark.long
def test_without_a_home_it_serves_from_the_cache_that_it_is_given(homeless: Sandbox) -> None:
    config = CONFIG.format(homeless.home / "cache")
    with serving(homeless, config, *free_ports(2)) as served:
        assert httpx.get(f"{served.http}/readyz", timeout=60, trust_env=False).status_code == 200
        assert_ends_cleanly(served, signal.SIGTERM)
    assert not (ROOT / "~").exists()


# A home that nobody can write, root included.
UNWRITABLE = "/dev/null"


def test_a_home_that_cannot_be_written_is_named() -> None:
    with sandbox() as found:
        found.extra["HOME"] = UNWRITABLE
        output = str(found.home / "out")
        converted = found.run("convert", "builtin:llama", "--family", "llama", "--output", output)
        assert converted.returncode == 0, "it needs no cache"
        refused = found.run("serve")
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1), refused.stderr
        assert refused.stderr.startswith(f"nibble: artifacts.cache_dir: {UNWRITABLE}/.cache/nibble cannot be written")


@pytest.mark.long
def test_with_a_home_that_cannot_be_written_it_serves_from_the_cache_that_it_is_given() -> None:
    with sandbox() as found:
        found.extra["HOME"] = UNWRITABLE
        with serving(found, CONFIG.format(found.home / "cache"), *free_ports(2)) as served:
            assert httpx.get(f"{served.http}/readyz", timeout=60, trust_env=False).status_code == 200
            assert_ends_cleanly(served, signal.SIGTERM)
