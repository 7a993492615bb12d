"""How a served cluster starts, waits and ends."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time

import httpx
import pytest

from cluster.machine.isa import available_cores
from cluster.ray_cluster import free_ports
from tests.integration.processes import Sandbox, Served, assert_ends_cleanly, sandbox, serving

TWO_MODELS = """
models:
- {name: fits, family: bloom, checkpoint: 'builtin:bloom', threads: 1}
- {name: waits, family: bloom, checkpoint: 'builtin:bloom', threads: 2}
"""


# The same is asserted every day where the session's server ends, by SIGINT (tests/integration/conftest.py), and where
# that of test_artifacts.py does, by SIGTERM.
@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_serve_and_leaves_no_process_and_no_file(number: signal.Signals) -> None:
    config = "models:\n- {name: bloom, family: bloom, checkpoint: 'builtin:bloom', threads: 1}\n"
    with sandbox() as home, serving(home, config, *free_ports(2)) as served:
        assert httpx.get(f"{served.http}/readyz", timeout=60).status_code == 200
        assert list((home.home / ".cache" / "nibble" / "clusters").glob("*.json"))
        assert_ends_cleanly(served, number)


@pytest.mark.long
def test_the_next_start_sweeps_what_a_killed_server_left() -> None:
    config = "models:\n- {name: bloom, family: bloom, checkpoint: 'builtin:bloom', threads: 1}\n"
    with sandbox() as home:
        with serving(home, config, *free_ports(2)) as killed:
            outside = home.folders_outside()
            os.kill(killed.process.pid, signal.SIGKILL)
            killed.process.wait()
        assert any(folder.exists() for folder in outside), "a killed process removes nothing"
        left = set(home.ray_tmpdir.iterdir())
        assert left
        processes = {pid for pid, _ in home.titled()}
        with serving(home, config, *free_ports(2)) as served:
            assert not any(folder.exists() for folder in outside | left)
            assert not processes & {pid for pid, _ in home.titled()}
            assert httpx.get(f"{served.http}/readyz", timeout=60).status_code == 200
            assert_ends_cleanly(served, signal.SIGTERM)


def test_more_threads_than_the_machine_has_cores_are_refused_before_anything_starts() -> None:
    with sandbox() as home:
        path = home.home / "nibble.yaml"
        path.write_text("models:\n- {name: a, family: bloom, checkpoint: 'builtin:bloom', threads: 1000}\n")
        result = home.run("serve", str(path))
        assert result.returncode == 1
        assert f"models[0].threads: found 1000, this machine allows 1..{available_cores()}" in result.stderr
        assert list(home.ray_tmpdir.iterdir()) == []


def test_a_model_that_cannot_be_converted_ends_serve_with_one_line() -> None:
    config = "models:\n- {name: a, family: bloom, checkpoint: 'builtin:llama'}\n"
    with sandbox() as home:
        path = home.home / "nibble.yaml"
        path.write_text(config)
        result = home.run("serve", str(path))
        assert result.returncode == 1
        assert "LlamaForCausalLM" in result.stderr
        assert "Traceback" not in result.stderr
        assert home.wait_no_processes() == []


def wait_until_ready(served: Served, model: str, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError, ValueError):  # the router may not have started
            cards = httpx.get(f"{served.http}/v1/models", timeout=30).json().get("data", [])
            if any(card["id"] == model and card["ready"] for card in cards):
                return
        time.sleep(0.2)
    raise AssertionError(f"{model} is not ready after {timeout} s:\n{served.output}")


def test_in_a_joined_cluster_what_does_not_fit_waits_and_artifacts_outlive_the_driver(
    one_cpu_head: tuple[Sandbox, str],
) -> None:
    home, address = one_cpu_head
    arguments = ("--address", address)
    with serving(
        home, TWO_MODELS, *free_ports(2), *arguments, until="waits: 1 starting; waits for a node with 2 free CPUs"
    ) as served:
        wait_until_ready(served, "fits")
        answer = httpx.post(
            f"{served.http}/v1/completions", json={"model": "fits", "prompt": "Q:", "max_tokens": 4}, timeout=60
        )
        assert answer.status_code == 200
        refused = httpx.post(f"{served.http}/v1/completions", json={"model": "waits", "prompt": "Q:"}, timeout=60)
        assert refused.status_code == 503
        assert httpx.get(f"{served.http}/readyz", timeout=60).json()["not_ready"] == ["waits"]
        status = home.run("status", *arguments)
        assert re.search(
            r"waits +│ 1 starting; waits for a node with 2 free CPUs \(in the whole cluster 0 are free\)", status.stdout
        )
        assert served.stop() == 0
    # The driver that converted is gone; the store still owns the artifact, and another driver can read it whole.
    listed = home.run("status", *arguments)
    assert "builtin:bloom" in listed.stdout
    output = home.home / "int4"
    exported = home.run("convert", "builtin:bloom", "--family", "bloom", "--output", str(output), *arguments)
    assert exported.returncode == 0, exported.stderr
    assert (output / "bigdl_llm_bloom_q4_0.bin").is_file()
