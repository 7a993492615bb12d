"""Every overlay, every component and every pair of them render, and break no rule of `rules.py`."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from cluster.cli import app
from cluster.commands.render import rayservice_patch, settings_file
from cluster.config import default_config, load_config
from tests.k8s.rules.findings import configuration, findings
from tests.k8s.rules.manifests import (
    COMPONENTS,
    EITHER,
    K8S,
    OVERLAYS,
    cluster_spec,
    combination,
    of_kind,
    overlay,
    pods,
)
from tests.k8s.rules.pods import quantity
from tests.k8s.rules.schema import VERSIONS

CONFIGS = sorted(K8S.glob("*/nibble.yaml")) + sorted(K8S.glob("overlays/*/nibble.yaml"))
ENDS = (VERSIONS[0], VERSIONS[-1])  # of Kubernetes' versions; overlays are held to all of them


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_breaks_no_rule(name: str) -> None:
    assert findings(overlay(name)) == []


@pytest.mark.parametrize("name", ["base", *COMPONENTS])
def test_a_component_alone_breaks_no_rule(name: str) -> None:
    assert findings(combination([] if name == "base" else [name]), ENDS) == []


# Those that change the pods of Ray's groups; the others only add documents, or fields that nothing else has.
PAIRS = [pair for pair in combinations(COMPONENTS[:7], 2) if set(pair) != EITHER]


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_a_pair_of_components_breaks_no_rule(pair: tuple[str, str]) -> None:
    assert findings(combination(pair), ENDS) == []


@pytest.mark.parametrize("without", sorted(EITHER))
def test_all_components_together_break_no_rule(without: str) -> None:
    assert findings(combination([each for each in COMPONENTS if each != without]), ENDS) == []


def test_every_component_is_in_the_combinations_and_in_the_readme() -> None:
    assert {path.parent.name for path in K8S.glob("components/*/kustomization.yaml")} == set(COMPONENTS)
    readme = (K8S / "README.md").read_text()
    for name in (*COMPONENTS, *OVERLAYS):
        assert f"`{name}`" in readme, f"k8s/README.md does not tell what {name} is for"


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_readme_tells_what_an_overlay_takes(name: str) -> None:
    documents = overlay(name)
    counted = [(pod, pod.group.get("replicas", 1)) for pod in pods(documents)]  # StatefulSets here have one pod
    cpu, memory = (
        sum(count * quantity(c["resources"]["limits"][key]) for pod, count in counted for c in pod.containers)
        for key in ("cpu", "memory")
    )
    (row,) = (line for line in (K8S / "README.md").read_text().splitlines() if line.startswith(f"| `{name}`"))
    assert f"{cpu:g} CPUs, {memory / (1 << 30):g} GiB" in row


def test_an_overlay_s_images_name_registry_and_tag() -> None:
    images = [{"name": "nibble-serve", "newName": "registry.example.com/nibble-serve", "newTag": "9"}]
    documents = combination(["isa-groups"], images=images)
    assert {pod.main["image"] for pod in pods(documents)} == {"registry.example.com/nibble-serve:9"}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.parent.name)
def test_what_is_made_of_a_configuration_is_up_to_date(file: Path) -> None:
    config = load_config(file)
    assert (file.parent / "serve-config.yaml").read_text() == rayservice_patch(config, "nibble"), "run `make k8s`"
    assert (file.parent / "serve-settings.env").read_text() == settings_file(config), "run `make k8s`"


@pytest.mark.parametrize(
    ("options", "made"), [(["--rayservice", "nibble"], "serve-config.yaml"), (["--settings"], "serve-settings.env")]
)
def test_the_command_line_makes_them(options: list[str], made: str, capsys: pytest.CaptureFixture[str]) -> None:
    app(["render", str(K8S / "base" / "nibble.yaml"), *options], standalone_mode=False)
    assert capsys.readouterr().out == (K8S / "base" / made).read_text()


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_serves_the_configuration_beside_it(name: str) -> None:
    own = K8S / "overlays" / name / "nibble.yaml"
    assert configuration(overlay(name)) == load_config(own if own.exists() else K8S / "base" / "nibble.yaml")


def test_the_base_serves_the_four_built_in_models() -> None:
    config = load_config(K8S / "base" / "nibble.yaml")
    assert config.models == default_config().models


def test_copied_groups_have_what_was_changed_before_them() -> None:
    documents = combination(["cache-volume", "durable-s3", "isa-groups", "spot-group"])
    groups = cluster_spec(documents)["workerGroupSpecs"]
    assert [group["groupName"] for group in groups] == ["avx2", "avx512", "amx", "spot"]
    first, *others = (group["template"]["spec"] for group in groups)
    assert "ephemeral" in first["volumes"][2]
    for other in others:
        for field in ("containers", "volumes", "securityContext", "terminationGracePeriodSeconds"):
            assert other[field] == first[field]
        assert other["affinity"] != first["affinity"]


def test_the_autoscaler_may_add_and_remove_workers() -> None:
    spec = cluster_spec(combination(["autoscaler"]))
    (group,) = spec["workerGroupSpecs"]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert group["minReplicas"] < group["maxReplicas"]


def test_production_has_its_parts() -> None:
    documents = overlay("prod")
    config = configuration(documents)
    assert config.auth.api_keys_file is not None
    assert config.artifacts.durable_uri is not None
    assert all(model.replicas.min < model.replicas.max for model in config.models)
    spec = cluster_spec(documents)
    assert spec["gcsFaultToleranceOptions"]["redisAddress"] == "nibble-redis:6379"
    (group,) = spec["workerGroupSpecs"]
    (spread,) = group["template"]["spec"]["topologySpreadConstraints"]
    assert (spread["topologyKey"], group["minReplicas"]) == ("topology.kubernetes.io/zone", 3)
    for kind in (
        "PodMonitor",
        "ScrapeConfig",
        "PrometheusRule",
        "HTTPRoute",
        "GRPCRoute",
        "StatefulSet",
        "PodDisruptionBudget",
    ):
        assert of_kind(documents, kind), kind
