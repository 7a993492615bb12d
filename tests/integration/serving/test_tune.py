"""`nibble tune` with both engines, as a user runs it."""

from __future__ import annotations

import os

import pytest

from cluster.config import load_config
from cluster.machine.isa import available_cores
from deployments.engines.splits import splits
from tests.integration.processes import sandbox


@pytest.mark.parametrize("engine", ["bigdl", "openvino"])
def test_every_split_is_measured_and_the_best_written(engine: str) -> None:
    with sandbox() as home:
        path = home.home / "nibble.yaml"
        path.write_text(f"models:\n- {{name: a, family: bloom, checkpoint: 'builtin:bloom', engine: {engine}}}\n")
        done = home.run(
            "tune", str(path), "--concurrency=2", "--requests=2", "--input-tokens=8", "--output-tokens=4", "--rounds=1",
            "--write",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        cores = min(available_cores(), len(os.sched_getaffinity(0)))
        for split in splits(cores):
            assert f"{split.replicas} x {split.threads}" in done.stdout
        model = load_config(path).models[0]
        assert (model.replicas.min, model.threads) in splits(cores)
        assert home.wait_no_processes() == []


def test_a_replica_that_fails_says_why() -> None:
    with sandbox() as home:
        path = home.home / "nibble.yaml"
        config = "{name: a, family: starcoder, checkpoint: 'builtin:starcoder', context: 4000}"
        path.write_text(f"models:\n- {config}\n")
        done = home.run("tune", str(path), "--rounds=1")
        assert done.returncode == 1
        assert "context: found 4000, allowed for this starcoder model is 1 to 512" in done.stderr
        assert home.run("tune", str(path), "b").stderr.count("allowed is one of a") == 1
