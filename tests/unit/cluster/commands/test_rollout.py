"""What `nibble apply` says will change, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.commands.rollout import Change, changes, different, refuse_fixed, refuse_others
from cluster.config import NibbleConfig
from cluster.errors import ConfigError
from deployments.router_settings import RouterSettings


def config(*models: dict[str, Any], **others: Any) -> NibbleConfig:
    entries = [{"family": "llama", "checkpoint": "builtin:llama", **model} for model in models or ({"name": "a"},)]
    return NibbleConfig.model_validate({"models": entries, **others})


def test_models_are_added_and_removed() -> None:
    before, after = config({"name": "a"}, {"name": "b"}), config({"name": "b"}, {"name": "c"})
    assert changes(before, after) == [Change("c", "added", replaced=True), Change("a", "removed")]
    assert [change.kind for change in changes(None, after)] == ["added", "added"]
    assert changes(after, after) == []


@pytest.mark.parametrize(
    ("key", "value", "replaced", "told"),
    [
        ("threads", 1, True, "threads: 2 to 1 (new replicas)"),
        ("context", 256, True, "context: 512 to 256 (new replicas)"),
        ("checkpoint", "org/other", True, "checkpoint: builtin:llama to org/other (new replicas)"),
        ("replicas", {"min": 1, "max": 3}, False, "replicas.max: 1 to 3 (without a restart)"),
        ("queue", {"max_queued": 8}, False, "queue.max_queued: 64 to 8 (without a restart)"),
        ("queue", {"max_ongoing": 2}, True, "queue.max_ongoing: None to 2 (new replicas)"),
    ],
)
def test_what_differs_is_named_and_whether_it_restarts_the_model(
    key: str, value: Any, replaced: bool, told: str
) -> None:
    (change,) = changes(config(), config({"name": "a", key: value}))
    assert change.replaced == replaced
    assert str(change) == f"a: {told}"


def test_what_belongs_to_no_model_is_named_by_its_key() -> None:
    after = config(limits={"max_tokens": 5}, router={"replicas": 2})
    assert different(config(), after) == ("limits.max_tokens: None to 5", "router.replicas: 1 to 2")


def test_ports_cannot_change() -> None:
    refuse_fixed(config(), config(limits={"max_tokens": 5}))
    with pytest.raises(ConfigError, match=r"^http: cannot change while the cluster runs \(http\.port: 8000 to 8001\)"):
        refuse_fixed(config(), config(http={"port": 8001}))
    refuse_fixed(config(), config(http={"cors_origins": ["*"]}))


def test_a_cluster_that_was_deployed_from_a_rendered_file_is_left_alone() -> None:
    refuse_others(RouterSettings(config=config(), apps={"a": "a.12345678"}))
    with pytest.raises(ConfigError, match="`nibble render`"):
        refuse_others(RouterSettings(config=config(), apps={"a": "a"}))
