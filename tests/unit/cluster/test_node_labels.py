from __future__ import annotations

from typing import Any

import pytest
from ray._private.label_utils import validate_fallback_strategy, validate_label_selector

from cluster.config import load_config, parse_config
from cluster.errors import ConfigError
from cluster.node_labels import meets, unmet
from cluster.nodes_config import NodesConfig

NODES = [{"nibble/isa": "avx2", "zone": "a"}, {"nibble/isa": "avx512", "zone": "b"}, {"ray.io/node-group": "headgroup"}]


def nodes(**values: Any) -> NodesConfig:
    return NodesConfig.model_validate(values)


@pytest.mark.parametrize(
    ("condition", "taken"),
    [("avx2", [0]), ("in(avx2,avx512)", [0, 1]), ("!avx2", [1, 2]), ("!in(avx2, avx512)", [2]), ("amx", [])],
)
def test_a_condition_is_judged_as_ray_does(condition: str, taken: list[int]) -> None:
    assert [place for place, node in enumerate(NODES) if meets({"nibble/isa": condition}, node)] == taken


def test_every_label_must_be_met_by_the_same_node() -> None:
    assert unmet(nodes(isa=["avx2"], labels={"zone": "a"}), NODES) is None
    told = unmet(nodes(isa=["avx2"], labels={"zone": "b"}), NODES)
    assert told == "no node has the label nibble/isa=avx2, zone=b; nibble/isa is avx2, avx512; zone is a, b"


def test_a_fallback_that_a_node_meets_is_enough() -> None:
    assert unmet(nodes(isa=["amx"]), NODES) == "no node has the label nibble/isa=amx; nibble/isa is avx2, avx512"
    assert unmet(nodes(isa=["amx"], fallback=[{"isa": ["avx512"]}]), NODES) is None
    assert unmet(nodes(isa=["amx"], fallback=[{}]), NODES) is None, "{} is any node"


def test_a_label_that_no_node_has_at_all_is_named() -> None:
    assert unmet(nodes(labels={"disk": ["ssd", "nvme"]}), NODES) == (
        "no node has the label disk=in(ssd,nvme); no node has a label disk"
    )


def test_ray_takes_what_a_selector_becomes() -> None:
    given = nodes(isa=["avx512", "amx"], labels={"a.b/zone": "!a"}, fallback=[{"isa": ["avx2"]}, {}])
    options = given.actor_options
    assert options == {
        "label_selector": {"nibble/isa": "in(avx512,amx)", "a.b/zone": "!a"},
        "fallback_strategy": [{"label_selector": {"nibble/isa": "avx2"}}, {"label_selector": {}}],
    }
    assert validate_label_selector(options["label_selector"]) is None
    assert validate_fallback_strategy(options["fallback_strategy"]) is None
    assert "fallback_strategy" not in nodes(isa=["amx"]).actor_options


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "names no label"),
        ({"isa": ["sse"]}, r"nodes\.isa\[0\]: found 'sse'"),
        ({"labels": {"zone": "in(a,b)"}}, r"nodes\.labels\.zone\[0\]: found 'in\(a,b\)'"),
        ({"labels": {"zone": []}}, r"nodes\.labels\.zone: found \[\]"),
        ({"labels": {"zone": ["!a", "b"]}}, "a value with ! must be the only one"),
        ({"labels": {"two words": "a"}}, "nodes.labels.two words"),
        ({"isa": ["amx"], "labels": {"nibble/isa": "avx"}}, "isa and labels both give nibble/isa"),
        ({"isa": ["amx"], "fallback": [{"zone": "a"}]}, r"nodes\.fallback\[0\]\.zone: unknown key"),
    ],
)
def test_what_is_no_placement_is_refused_with_its_key(given: Any, told: str) -> None:
    model = {"name": "a", "family": "llama", "checkpoint": "builtin:llama", "nodes": given}
    with pytest.raises(ConfigError, match=told):
        parse_config({"models": [model]}, "nibble.yaml")


def test_a_placed_model_can_be_a_key_and_is_read_from_yaml(tmp_path: Any) -> None:
    file = tmp_path / "nibble.yaml"
    file.write_text(
        "models: [{name: a, family: llama, checkpoint: 'builtin:llama', nodes: {isa: [amx], labels: {zone: [a, b]}}}]"
    )
    (model,) = load_config(file).models
    assert {model: 1}[load_config(file).models[0]] == 1
    assert model.nodes is not None
    assert model.nodes.selector == {"nibble/isa": "amx", "zone": "in(a,b)"}
