"""The reference example by a family's name alone, against a Hub that has its default checkpoints in small."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.families import FAMILIES, FAMILY_NAMES, FamilyName
from tests.default_checkpoints import write_default_checkpoint
from tests.hub_lookalike import HubLookalike
from tests.integration.processes import sandbox

HEADINGS = ("HuggingFace transformers tokenizer", "bigdl-llm based tokenizer", "fast forward")


# The other two have the same kinds of files as bloom's.
FAMILIES_EVERY_DAY = ("llama", "bloom")


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=() if family in FAMILIES_EVERY_DAY else pytest.mark.long) for family in FAMILY_NAMES],
)
def test_a_default_works_by_its_familys_name_and_the_second_time_without_a_request(
    family: FamilyName, tmp_path: Path
) -> None:
    checkpoint = write_default_checkpoint(tmp_path / "checkpoint", family, small=True)
    repo = FAMILIES[family].default_repo
    with HubLookalike() as hub, sandbox(HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hub")) as home:
        hub.add(repo, checkpoint)
        first = home.run("pipeline", "--thread-num", "2", "--model-family", family)
        assert first.returncode == 0, first.stdout + first.stderr
        assert [line.strip("- ") for line in first.stdout.splitlines() if line.startswith("-----")] == [*HEADINGS]
        weights = [path for path in checkpoint.glob("*.bin") if path.stat().st_size]
        for path in weights:  # the header is read when planning, so a little comes twice
            assert path.stat().st_size <= hub.served(path.name) < 2 * path.stat().st_size + 100_000, path.name
        asked = len(hub.requests)
        second = home.run("pipeline", "--thread-num", "2", "--model-family", family)
        assert second.returncode == 0, second.stdout + second.stderr
        assert len(hub.requests) == asked
    assert texts(second.stdout) == texts(first.stdout)


def texts(output: str) -> list[str]:
    """The line that follows each "Output:" but the last, whose completion has an id and a time of its own."""
    lines = output.splitlines()
    found = [lines[place + 1] for place, line in enumerate(lines) if line == "Output:"]
    assert len(found) == len(HEADINGS)
    return found[:-1]
