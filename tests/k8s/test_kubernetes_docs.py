"""What docs/how-to/kubernetes.md says of files, commands and sizes is so."""

from __future__ import annotations

import re
from math import isclose
from typing import Any

from typer.main import get_command

from cluster.cli import app
from tests.k8s.built_image import REPOSITORY
from tests.k8s.rules import manifests

PAGE = (REPOSITORY / "docs/how-to/kubernetes.md").read_text()
OWN = "k8s/overlays/mine"  # the reader's
MIB = {"Mi": 1, "Gi": 1024}
# A row of the overlays' table: path, CPUs and GiB, and in brackets those of the most workers.
ROW = re.compile(r"^\| `(k8s/\S+)` \|.*\| (\d+)(?: \((\d+)\))? \| ([\d.]+) GiB(?: \(([\d.]+)\))? \|", re.MULTILINE)


def commands(program: str) -> set[str]:
    """The first word after `program`, wherever a line of code or a code span begins with it."""
    return set(re.findall(rf"(?:^|`|-- ){program} ([a-z][a-z0-9-]*)", PAGE, re.MULTILINE))


def test_every_path_is_there() -> None:
    named = {path.rstrip("/.") for path in re.findall(r"\bk8s/[\w./-]*", PAGE)}
    assert {"k8s/image/Dockerfile", "k8s/overlays/dev", "k8s/overlays/prod"} <= named
    assert [path for path in sorted(named) if not path.startswith(OWN) and not (REPOSITORY / path).exists()] == []


def test_every_command_is_there() -> None:
    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    assert {"generate", "keys", "status", "drain"} <= commands("nibble") <= known
    makefile = (REPOSITORY / "Makefile").read_text()
    assert commands("make")
    assert [target for target in commands("make") if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_every_component_is_there() -> None:
    for name in re.findall(r"omponents? `([\w-]+)`", PAGE):
        assert (REPOSITORY / "k8s/components" / name).is_dir(), name


def size(resources: dict[str, Any]) -> tuple[int, int]:
    """CPUs and MiB of a container's limits."""
    limits = resources["limits"]
    return int(limits["cpu"]), int(limits["memory"][:-2]) * MIB[limits["memory"][-2:]]


def total(documents: list[Any], replicas: str) -> tuple[int, float]:
    """CPUs and GiB of all containers, with so many workers of each group as its field `replicas` says."""
    config = manifests.one(documents, "RayService")["spec"]["rayClusterConfig"]
    sizes = [size(each["resources"]) for each in containers(config["headGroupSpec"])]
    if config.get("enableInTreeAutoscaling"):
        sizes.append(size(config["autoscalerOptions"]["resources"]))
    for group in config["workerGroupSpecs"]:
        sizes += group[replicas] * [size(each["resources"]) for each in containers(group)]
    for stateful in manifests.of_kind(documents, "StatefulSet"):
        sizes += stateful["spec"]["replicas"] * [size(each["resources"]) for each in containers(stateful["spec"])]
    return sum(cpus for cpus, _ in sizes), sum(memory for _, memory in sizes) / 1024


def containers(owner: dict[str, Any]) -> list[Any]:
    return list(owner["template"]["spec"]["containers"])


def test_the_costs_of_the_overlays_are_those_of_their_pods() -> None:
    rows = ROW.findall(PAGE)
    overlays = {f"k8s/overlays/{name}" for name in manifests.OVERLAYS}
    assert {row[0] for row in rows} == {"k8s/base", *overlays}
    for path, cpus, most_cpus, memory, most_memory in rows:
        documents = manifests.kustomize(REPOSITORY / path)
        found = total(documents, "replicas")
        assert found == (int(cpus), float(memory)), path
        if most_cpus:
            most = total(documents, "maxReplicas")
            assert most[0] == int(most_cpus), path
            assert isclose(most[1], float(most_memory)), path


def test_one_image_entry_is_enough_for_all_pods() -> None:
    """kustomize finds the image in a RayService, as the page has it."""
    documents = manifests.overlay("prod")
    images = {
        container["image"]
        for group in (
            manifests.one(documents, "RayService")["spec"]["rayClusterConfig"]["headGroupSpec"],
            *manifests.one(documents, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"],
        )
        for container in containers(group)
    }
    assert images == {"nibble-serve:0.1.0"}
    assert 'newTag: "0.1.0"' in PAGE
    assert PAGE.count("nibble-serve:0.1.0") >= 3
