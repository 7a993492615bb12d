"""Fixtures for the tests of the APIs, which answer with echoes, for those that plan a conversion, and for those that
ask a Hub."""

from __future__ import annotations

import functools
import platform
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub.utils import close_session
from starlette.testclient import TestClient

from cluster.families import FAMILY_NAMES, FamilyName
from tests.hub_lookalike import HubLookalike
from tests.random_checkpoint import SHAPES, write_random_checkpoint
from tests.unit.fakes import EchoModel
from tests.unit.http_fakes import client_of
from tests.unit.hub_client import point_at

platform.platform()  # asks `uname -p` the first time, and keeps the answer


@pytest.fixture(autouse=True)
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that starts a process belongs into tests/integration."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a unit test starts a process")

    monkeypatch.setattr("subprocess.Popen.__init__", refuse)
    monkeypatch.setattr("os.fork", refuse)


@pytest.fixture(scope="session", autouse=True)
def certificates_read_once() -> Iterator[None]:
    """Each HTTP client would read the certificates of all authorities anew, to speak to this machine without TLS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ssl.create_default_context", functools.cache(ssl.create_default_context))
        yield


@pytest.fixture
def model() -> EchoModel:
    return EchoModel()


@pytest.fixture
def client(model: EchoModel) -> TestClient:
    return client_of(model)


@pytest.fixture(params=FAMILY_NAMES)
def family(request: pytest.FixtureRequest) -> FamilyName:
    name: FamilyName = request.param
    return name


@pytest.fixture
def checkpoint(family: FamilyName, tmp_path: Path) -> Path:
    return write_random_checkpoint(tmp_path / "checkpoint", SHAPES[family])


@pytest.fixture
def bloom(tmp_path: Path) -> Path:
    return write_random_checkpoint(tmp_path / "checkpoint", SHAPES["bloom"])


@pytest.fixture
def hub_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own for huggingface_hub, whose constants were read when it was imported."""
    home = tmp_path / "hub-home"
    home.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    return home


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What nibble and huggingface_hub would wait before they try again, without the waiting."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


@pytest.fixture
def hub(hub_home: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> Iterator[HubLookalike]:
    with HubLookalike() as served:
        point_at(served, monkeypatch)
        yield served
    close_session()
