"""Environments of their own for clients whose packages do not go together with the project's, or are not Python's: made
by pip and npm when a test first needs one, kept in this user's cache folder under the digest of what it has.

A test whose environment cannot be made is skipped, with what pip or npm said."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from filelock import FileLock

HERE = Path(__file__).parent
# pip and npm reach the network as whoever runs the tests has configured them, the clients do not.
ONLINE = dict(os.environ)
CLOSED = "http://127.0.0.1:9"
PROXIES = {"HTTP_PROXY": CLOSED, "HTTPS_PROXY": CLOSED, "ALL_PROXY": CLOSED, "NO_PROXY": "127.0.0.1,localhost"}
OFFLINE = {
    **PROXIES,
    **{name.lower(): value for name, value in PROXIES.items()},
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
    "LANGSMITH_TRACING": "false",
    "LANGCHAIN_TRACING_V2": "false",
    "DO_NOT_TRACK": "1",
}
INSTALL_TIMEOUT_S = 900


def python_tool(name: str) -> Path:
    """The folder of programs of a virtual environment with `requirements-NAME.txt`."""
    requirements = HERE / f"requirements-{name}.txt"

    def install(folder: Path) -> None:
        run_installer([sys.executable, "-m", "venv", str(folder)])
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "-r"]
        run_installer([*pip, str(requirements)])

    return made(name, requirements.read_text() + sys.version, install) / "bin"


def node_tool() -> Path:
    """A folder whose `node_modules` has the packages of node/package.json."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node and npm are not installed")
    package = HERE / "node" / "package.json"

    def install(folder: Path) -> None:
        folder.mkdir()
        shutil.copy(package, folder)
        npm = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts", "--loglevel=error"]
        run_installer(npm, folder)

    return made("node", package.read_text(), install)


def made(name: str, content: str, install: Callable[[Path], None]) -> Path:
    """The folder that `install` made, now or in an earlier run."""
    cache = Path(ONLINE.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nibble-test-clients"
    folder = cache / f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    complete = folder / "complete"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            try:
                install(folder)
            except InstallError as error:
                shutil.rmtree(folder, ignore_errors=True)
                pytest.skip(f"{name} cannot be installed: {error}")
            complete.touch()
    return folder


class InstallError(Exception):
    """The installer's last words."""


def run_installer(command: Sequence[str], folder: Path = HERE) -> None:
    try:
        ended = subprocess.run(
            command, cwd=folder, env=ONLINE, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise InstallError(f"not done within {INSTALL_TIMEOUT_S} s") from None
    if ended.returncode != 0:
        raise InstallError(ended.stderr.strip()[-500:])


def run_client(command: Sequence[str | Path], folder: Path, timeout: float = 600, **environment: str) -> str:
    """What a client prints; it must end well. `folder`: its home, and where it works."""
    own = {"HOME": str(folder), "HF_HOME": str(folder / "hf"), "COLUMNS": "200", "TERM": "dumb", **environment}
    ended = subprocess.run(
        [str(each) for each in command],
        cwd=folder,
        env={**ONLINE, **OFFLINE, **own},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert ended.returncode == 0, f"{ended.stdout[-4000:]}\n{ended.stderr[-4000:]}"
    return ended.stdout


def run_script(command: Sequence[str | Path], folder: Path, **environment: str) -> dict[str, object]:
    """What a script of this folder says of its client: JSON, its last line."""
    found = json.loads(run_client(command, folder, **environment).strip().splitlines()[-1])
    assert isinstance(found, dict)
    return found
