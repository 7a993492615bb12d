from __future__ import annotations

from pathlib import Path

import yaml

from cluster.commands.tune import write_split
from cluster.config import load_config
from deployments.engines.splits import Result, Split, shares, splits


def test_splits_are_powers_of_two_and_all_cores() -> None:
    assert splits(1) == [(1, 1)]
    assert splits(2) == [(2, 1), (1, 2)]
    assert splits(8) == [(8, 1), (4, 2), (2, 4), (1, 8)]
    assert splits(6) == [(6, 1), (3, 2), (1, 6)]  # one replica of 4 threads would leave two cores idle


def test_clients_are_shared_evenly() -> None:
    assert shares(8, 2) == [4, 4]
    assert shares(5, 3) == [2, 2, 1]
    assert shares(1, 2) == [1, 0]


CONFIG = """\
# Two models.
models:
- name: one   # the first
  family: llama
  checkpoint: builtin:llama
- {name: two, family: bloom, checkpoint: 'builtin:bloom', threads: 1, replicas: {max: 3}}
"""


def test_the_split_is_written_into_the_models_entry_and_everything_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "nibble.yaml"
    path.write_text(CONFIG)
    write_split(path, "two", Result(Split(2, 4), 1.0, 1.0, 1.0))
    write_split(path, "one", Result(Split(1, 8), 1.0, 1.0, 1.0))
    text = path.read_text()
    assert "# Two models." in text
    assert "# the first" in text
    one, two = load_config(path).models
    assert (one.threads, one.replicas.min, one.replicas.max) == (8, 1, 1)
    assert (two.threads, two.replicas.min, two.replicas.max) == (4, 2, 3)
    assert yaml.safe_load(text)["models"][1]["checkpoint"] == "builtin:bloom"
