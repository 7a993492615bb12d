from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray.serve._private.autoscaling_state import DeploymentAutoscalingState
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from cluster.config import ArtifactsConfig, LimitsConfig, NibbleConfig, parse_config
from cluster.conversion.wanted import wanted_artifacts
from cluster.model_config import ModelConfig
from deployments.app import model_application, model_version, rendered, scaling
from deployments.load_board import LoadBoard, load_board
from deployments.router_settings import RouterSettings
from deployments.scaling import ModelLoad


def model(**values: object) -> ModelConfig:
    given = {"name": "a", "family": "llama", "checkpoint": "builtin:llama", **values}
    return ModelConfig.model_validate(given)


def test_a_fixed_number_of_replicas_is_not_left_to_the_autoscaler() -> None:
    assert scaling(model(replicas={"min": 3, "max": 3})) == {"num_replicas": 3}
    assert scaling(model()) == {"num_replicas": 1}


def test_a_range_of_replicas_scales_on_the_requests_of_each() -> None:
    scaled = scaling(model(replicas={"min": 1, "max": 4}, queue={"max_ongoing": 6}))
    serve = AutoscalingConfig(**scaled["autoscaling_config"])
    assert (serve.min_replicas, serve.max_replicas, serve.target_ongoing_requests) == (1, 4, 3)
    scaled = scaling(model(replicas={"min": 1, "max": 2, "target_ongoing_requests": 1.5}))
    assert scaled["autoscaling_config"]["target_ongoing_requests"] == 1.5


def decisions(serve: AutoscalingConfig, loads: dict[str, ModelLoad] | None, running: int, target: int) -> list[int]:
    """Of Serve's controller over 40 minutes, half a second each; how many replicas it wants after each change."""
    state = DeploymentAutoscalingState(DeploymentID("a", "a"))
    info = SimpleNamespace(
        deployment_config=SimpleNamespace(autoscaling_config=serve, gang_scheduling_config=None),
        target_capacity=None,
        target_capacity_direction=None,
    )
    state.register(info, target)
    state.update_running_replica_ids([ReplicaID(str(id), DeploymentID("a", "a")) for id in range(running)])
    load_board().loads = loads
    found = [target]
    for _ in range(4800):
        decided = state.get_decision_num_replicas(found[-1])
        found += [decided] * (decided != found[-1])
    return found


async def test_serve_takes_the_policy_s_decisions_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve's own autoscaling code, with the policy as its controller unpickles it."""
    now = 1e9

    def clock() -> float:
        nonlocal now
        now += 0.25
        return now

    monkeypatch.setattr(LoadBoard, "listen", lambda board: None)
    monkeypatch.setattr("time.time", clock)
    made = model(replicas={"min": 0, "max": 5}, queue={"max_ongoing": 4})
    serve = AutoscalingConfig(**scaling(made)["autoscaling_config"])
    burst = ModelLoad(queued=12, queued_tokens=1000, idle_s=0)
    assert decisions(serve, {"a": burst}, 0, 0) == [0, 3], "more than one from zero, in one decision"
    assert decisions(serve, {"a": ModelLoad(idle_s=1e6)}, 3, 3) == [3, 1, 0]
    assert decisions(serve, {"a": ModelLoad(idle_s=299)}, 1, 1) == [1]
    for unknown in (None, {"b": burst}):
        assert decisions(serve, unknown, 2, 2) == [2]
        assert decisions(serve, unknown, 0, 0) == [0]
    load_board().loads = None


def version(**values: object) -> str:
    made = model(**values)
    return model_version(made, wanted_artifacts(made), ArtifactsConfig())


def test_a_version_is_what_replicas_are_made_from() -> None:
    assert version() == version(replicas={"min": 1, "max": 3}) == version(queue={"max_queued": 3})
    others = [version(threads=1), version(context=64), version(queue={"max_ongoing": 1}), version(checkpoint="o/r")]
    assert len({version(), *others}) == 5
    made = model()
    (wanted,) = wanted_artifacts(made)
    addressed = wanted.model_copy(update={"artifact_id": "1"})
    assert model_version(made, [addressed], ArtifactsConfig()) != model_version(made, [wanted], ArtifactsConfig())


def config(**values: object) -> NibbleConfig:
    entries = [{"name": name, "family": "llama", "checkpoint": "builtin:llama"} for name in "ab"]
    entries[1] |= values.pop("b", {})  # type: ignore[arg-type]
    return NibbleConfig.model_validate({"models": entries, **values})


def apps_of(config: NibbleConfig) -> dict[str, dict[str, Any]]:
    document = rendered(config)
    ServeDeploySchema.model_validate(yaml.safe_load(yaml.safe_dump(document)))
    return {app["name"]: app for app in document["applications"]}


def test_a_rendered_configuration_has_one_application_a_model_and_one_with_a_route() -> None:
    apps = apps_of(config())
    assert {name: app["route_prefix"] for name, app in apps.items()} == {"nibble": "/", "a": None, "b": None}
    (router,) = apps["nibble"]["deployments"]
    settings = RouterSettings.model_validate(router["user_config"])
    assert (settings.config, settings.apps) == (config(), {"a": "a", "b": "b"})
    assert router["user_config"]["awaited"] == ["a", "b"], "in place, a model has no replica for a while: requests wait"
    assert settings.awaited == {"a", "b"}
    part = parse_config({"models": [apps["a"]["args"]["model"]]}, "args")
    assert part.models[0].name == "a"


def test_a_name_with_a_slash_is_a_deployment_s_without() -> None:
    made = model(name="org/a", aliases=["b"])
    apps = apps_of(NibbleConfig(models=(made,)))
    assert apps["org--a"]["deployments"][0]["name"] == "org--a"
    (router,) = apps["nibble"]["deployments"]
    settings = RouterSettings.model_validate(router["user_config"])
    assert (settings.apps, settings.config.models[0].aliases) == ({"org/a": "org--a"}, ("b",))


def code_of(app: dict[str, Any]) -> tuple[Any, ...]:
    """What Serve builds an application anew for."""
    return app["import_path"], app.get("args")


def test_what_restarts_nothing_stands_outside_of_what_serve_builds_anew() -> None:
    before = apps_of(config())
    for changed in (
        config(limits={"timeout_s": 5, "stall_s": 1}),
        config(b={"replicas": {"min": 1, "max": 4}}),
        config(b={"queue": {"max_queued": 1}}),
        config(router={"replicas": 3}),
        config(b={"aliases": ["c"]}),
    ):
        after = apps_of(changed)
        assert after != before
        assert {name: code_of(app) for name, app in after.items()} == {n: code_of(app) for n, app in before.items()}
    after = apps_of(config(b={"context": 64}))
    assert [name for name in after if code_of(after[name]) != code_of(before[name])] == ["b"]


def test_what_stops_waits_as_long_as_a_request_may_take() -> None:
    for app in apps_of(config(limits={"timeout_s": 900})).values():
        assert app["deployments"][0]["graceful_shutdown_timeout_s"] > 900
    for app in apps_of(config(limits={"timeout_s": 900, "drain_s": 7})).values():
        assert 7 < app["deployments"][0]["graceful_shutdown_timeout_s"] < 20


def test_a_model_s_nodes_are_its_replicas_label_selector() -> None:
    placed = model(nodes={"isa": ["avx512", "amx"], "fallback": [{"isa": ["avx2"]}]})
    bound = model_application(placed, wanted_artifacts(placed), ArtifactsConfig(), LimitsConfig())
    options = bound._bound_deployment.ray_actor_options
    assert options["label_selector"] == {"nibble/isa": "in(avx512,amx)"}
    assert options["fallback_strategy"] == [{"label_selector": {"nibble/isa": "avx2"}}]
    assert options["num_cpus"] == placed.threads
    elsewhere = model(nodes={"isa": ["avx2"]})
    assert version(nodes={"isa": ["avx512"]}) != version(nodes={"isa": ["avx2"]}), "moved replicas are new ones"
    assert version() != version(nodes=elsewhere.nodes)


def test_where_a_rendered_model_runs_is_what_it_is_built_from_and_where_the_router_does_is_not() -> None:
    placed = apps_of(config(b={"nodes": {"labels": {"zone": ["a", "b"]}}}))
    assert "nodes" not in placed["a"]["args"]["model"]
    (read,) = parse_config({"models": [placed["b"]["args"]["model"]]}, "args").models
    assert read.nodes is not None
    assert read.nodes.selector == {"zone": "in(a,b)"}
    (router,) = apps_of(config(router={"nodes": {"labels": {"zone": "a"}}}))["nibble"]["deployments"]
    assert router["ray_actor_options"] == {"num_cpus": 0, "label_selector": {"zone": "a"}}
