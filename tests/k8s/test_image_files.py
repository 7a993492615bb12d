"""The Dockerfile and its script, without building: linters, and rules of our own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.k8s.built_image import DOCKERFILE, REPOSITORY

tomllib = pytest.importorskip("tomllib", reason="reads pyproject.toml with Python 3.11's own parser")

SCRIPT = DOCKERFILE.with_name("install.sh")
BIN = Path(sys.executable).parent
INSTRUCTIONS = [
    line.split(None, 1)
    for line in re.sub(r"\\\n", " ", DOCKERFILE.read_text()).splitlines()
    if line and not line.startswith("#")
]


def of(name: str) -> list[str]:
    return [words[1] for words in INSTRUCTIONS if words[0] == name]


@pytest.mark.parametrize(("linter", "file"), [("hadolint", DOCKERFILE), ("shellcheck", SCRIPT)])
def test_linters_find_nothing(linter: str, file: Path) -> None:
    done = subprocess.run([BIN / linter, file], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_bases_have_a_version() -> None:
    bases = [line.removeprefix("BASE=") for line in of("ARG") if line.startswith("BASE=")]
    assert len(bases) == 1
    assert re.fullmatch(r"\S+:\d[\w.-]*(@sha256:[0-9a-f]{64})?", bases[0])
    assert {line.split(" AS ")[0] for line in of("FROM")} == {"${BASE}"}


def test_every_step_is_the_script() -> None:
    """Which the tests can run too. Nothing is downloaded by the Dockerfile itself."""
    assert of("ADD") == []
    steps = [re.sub(r"^(--mount=\S+ )*", "", line) for line in of("RUN")]
    assert all(re.match(r"sh \S*/install\.sh (packages|system)\b", step) for step in steps)
    assert len(steps) == 2


def test_the_last_user_is_a_number_and_not_root() -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", of("USER")[-1])


def test_no_value_is_a_secret_or_an_address() -> None:
    values = " ".join([*of("ENV"), *of("ARG")])
    assert not re.search(r"token|secret|password|passwd|api_?key|credential", values, re.IGNORECASE)
    assert "://" not in DOCKERFILE.read_text() + SCRIPT.read_text()


def test_the_script_refuses_what_it_does_not_know() -> None:
    done = subprocess.run(["sh", SCRIPT, "everything"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "found the arguments 'everything', expected 'packages SOURCE EXTRAS' or 'system'" in done.stderr


def test_bigdl_is_installed_on_x86_alone_and_everything_else_everywhere() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(REPOSITORY / "requirements.lock").read_text().splitlines()]
    machine = {"x86_64": set[str](), "aarch64": set[str]()}
    for requirement in map(Requirement, lines):
        for name, wanted in machine.items():
            if requirement.marker is None or requirement.marker.evaluate({"platform_machine": name}):
                wanted.add(requirement.name)
    assert machine["x86_64"] - machine["aarch64"] == {"bigdl-llm"}
    assert not machine["aarch64"] - machine["x86_64"]


def test_the_extra_s3_is_what_the_tests_have() -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {*extras["s3"], *extras["openvino"]} <= set(extras["dev"])
