"""Prometheus itself (Debian's package has `prometheus` and `promtool`), on loopback, for one test."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from cluster.ray_cluster import free_ports

STARTING_S = 60


def missing(*commands: str) -> str | None:
    """Why a test that needs these commands cannot run here; None where it can."""
    absent = [command for command in commands if shutil.which(command) is None]
    return f"needs {', '.join(absent)} (Debian's package prometheus), not found on PATH" if absent else None


class Prometheus:
    """Its HTTP API."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=10)

    def _get(self, path: str, **parameters: str) -> Any:
        answer = self._client.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an instant query."""
        return self._get("query", query=expression)["result"]

    def label_values(self, series: str, label: str) -> list[str]:
        return self._get(f"label/{label}/values", **{"match[]": series})

    def targets(self) -> list[dict[str, Any]]:
        return self._get("targets")["activeTargets"]

    def alerts(self) -> list[dict[str, Any]]:
        """The alerting rules with their state."""
        return [rule for group in self._get("rules", type="alert")["groups"] for rule in group["rules"]]

    def ready(self) -> bool:
        try:
            return self._client.get("/-/ready").is_success
        except httpx.TransportError:
            return False

    def close(self) -> None:
        self._client.close()


@contextmanager
def running(folder: Path, jobs: list[dict[str, Any]], groups: list[dict[str, Any]], every: str) -> Iterator[Prometheus]:
    """A Prometheus that scrapes by `jobs` and evaluates the groups of rules. `every`: the time from one scrape, and one
    evaluation, to the next."""
    (port,) = free_ports(1)
    rules, config, log = folder / "rules.yaml", folder / "prometheus.yaml", folder / "prometheus.log"
    rules.write_text(yaml.safe_dump({"groups": groups}))
    intervals = {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every}
    config.write_text(yaml.safe_dump({"global": intervals, "rule_files": [str(rules)], "scrape_configs": jobs}))
    promtool("check", "config", str(config))
    command = [
        "prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
    ]  # fmt: skip
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        prometheus = Prometheus(f"http://127.0.0.1:{port}")
        try:
            deadline = time.monotonic() + STARTING_S
            while not prometheus.ready():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield prometheus
        finally:
            prometheus.close()
            process.terminate()


def promtool(*arguments: str) -> None:
    ended = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
