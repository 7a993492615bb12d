"""What a rollout does of Serve, and in which order, where a change succeeds, fails or needs room."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from io import StringIO
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from rich.console import Console

import deployments.app
from cluster.commands import rollout
from cluster.commands.rollout import Rollout
from cluster.config import NibbleConfig
from cluster.model_config import ModelConfig
from deployments.app import app_name, model_version
from deployments.router_settings import RouterSettings


class Target(NamedTuple):
    app: str
    router: RouterSettings | None = None


class Cluster:
    """Takes the place of Serve. `failing`: applications whose replicas do not start. `places`: how many applications of
    models have room beside each other; None: all."""

    def __init__(self) -> None:
        self.apps: dict[str, str] = {}  # the model of each application
        self.failing: set[str] = set()
        self.places: int | None = None
        self.steps: list[str] = []
        self.settings: RouterSettings | None = None

    def deploy(self, targets: Sequence[Target]) -> None:
        for target in targets:
            if target.app not in self.apps:
                self.steps.append(f"deploy {target.app}")
                self.apps[target.app] = target.app.rpartition(".")[0]

    def deploy_router(self, settings: RouterSettings) -> None:
        self.settings = settings
        self.steps.append(f"router {' '.join(sorted(settings.apps.values()))}")

    def delete(self, app: str) -> None:
        self.steps.append(f"delete {app}")
        self.apps.pop(app, None)  # it may be told twice

    def runs(self, app: str) -> bool:
        place = list(self.apps).index(app)
        return app not in self.failing and (self.places is None or place < self.places)

    def applications(self) -> dict[str, Any]:
        return {app: SimpleNamespace(deployments={model: self.state(app)}) for app, model in self.apps.items()}

    def state(self, app: str) -> Any:
        place = list(self.apps).index(app)
        failed = app in self.failing and (self.places is None or place < self.places)
        status = "DEPLOY_FAILED" if failed else "HEALTHY" if self.runs(app) else "UPDATING"
        states = {"RUNNING": 1} if self.runs(app) else {"PENDING_ALLOCATION": 1}
        return SimpleNamespace(status=status, message="it is broken" if failed else "", replica_states=states)

    def waiting_cpus(self) -> Counter[float]:
        full = self.places is not None and len(self.apps) > self.places
        return Counter({1: 1} if full else {})


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    serve = Cluster()
    for name, fake in {
        "deploy": serve.deploy,
        "deploy_router": serve.deploy_router,
        "delete": serve.delete,
        "serve_applications": serve.applications,
        "waiting_cpus": serve.waiting_cpus,
        "node_labels": list,
        "deployment_state": lambda *_: "a state",
        "wait_for_removed": lambda seconds: serve.steps.append(f"wait {seconds:g}"),
        "model_target": lambda model, wanted, config, app: Target(app),
        "POLL_S": 0.0,
        "ROOM_S": -1.0,
    }.items():
        monkeypatch.setattr(rollout, name, fake)
    monkeypatch.setattr(deployments.app, "addressed", lambda models, artifacts, console=None: [[] for _ in models])
    return serve


def entry(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "family": "llama", "checkpoint": "builtin:llama", "threads": 1, **fields}


def config(*entries: dict[str, Any]) -> NibbleConfig:
    return NibbleConfig.model_validate({"models": entries, "limits": {"drain_s": 7}})


def app_of(model: ModelConfig, whole: NibbleConfig) -> str:
    return app_name(model, model_version(model, [], whole.artifacts))


def serving(cluster: Cluster, before: NibbleConfig) -> RouterSettings:
    """As the cluster is before the change."""
    apps = {model.name: app_of(model, before) for model in before.models}
    cluster.apps = {app: name for name, app in apps.items()}
    return RouterSettings(config=before, apps=apps)


def run(before: RouterSettings, after: NibbleConfig) -> Rollout:
    change = Rollout(after, before, Console(file=StringIO()))
    change.run()
    return change


def test_new_replicas_run_before_the_router_and_the_old_ones_end_last(cluster: Cluster) -> None:
    before, after = config(entry("a")), config(entry("a", context=256))
    old, new = app_of(before.models[0], before), app_of(after.models[0], after)
    run(serving(cluster, before), after)
    assert cluster.steps == [f"deploy {new}", f"router {new}", f"delete {old}"]


def test_a_removed_model_ends_after_its_requests_have_begun(cluster: Cluster) -> None:
    before, after = config(entry("a"), entry("b")), config(entry("a"))
    kept, gone = (app_of(model, before) for model in before.models)
    run(serving(cluster, before), after)
    assert cluster.steps == [f"router {kept}", "wait 7", f"delete {gone}"]


def test_what_does_not_start_leaves_the_old_version(cluster: Cluster) -> None:
    before, after = config(entry("a")), config(entry("a", context=256))
    old, new = app_of(before.models[0], before), app_of(after.models[0], after)
    cluster.failing = {new}
    change = run(serving(cluster, before), after)
    assert change.failed == {"a": "its replicas fail to start: it is broken"}
    assert cluster.steps == [f"deploy {new}", f"delete {new}"]
    assert list(cluster.apps) == [old]


def test_where_there_is_no_room_the_old_version_makes_it_and_requests_wait(cluster: Cluster) -> None:
    before, after = config(entry("a")), config(entry("a", context=256))
    old, new = app_of(before.models[0], before), app_of(after.models[0], after)
    cluster.places = 1
    change = run(serving(cluster, before), after)
    assert change.failed == {}
    assert cluster.steps == [f"deploy {new}", f"router {new}", f"delete {old}", f"router {new}", f"delete {old}"]
    assert cluster.settings == RouterSettings(config=after, apps={"a": new}), "nothing is awaited any more"


def test_a_model_that_made_room_and_failed_is_restored(cluster: Cluster) -> None:
    """Its requests wait until the old version runs again, for which the failed one makes room; another model notices
    nothing."""
    before = config(entry("a"), entry("b"))
    after = config(entry("a", context=256), entry("b"))
    (old, kept), new = (app_of(model, before) for model in before.models), app_of(after.models[0], after)
    cluster.places, cluster.failing = 2, {new}
    settings = serving(cluster, before)
    change = run(settings, after)
    assert change.failed == {"a": "its replicas fail to start: it is broken"}
    made_room, restored = f"router {' '.join(sorted((kept, new)))}", f"router {' '.join(sorted((kept, old)))}"
    assert cluster.steps == [
        f"deploy {new}", made_room, f"delete {old}", f"deploy {old}", restored, f"delete {new}", restored,
        f"delete {new}",
    ]  # fmt: skip
    assert set(cluster.apps) == {old, kept}
    assert cluster.settings == settings, "as it was, and nothing is awaited for ever"


def test_a_model_that_can_neither_change_nor_be_restored_is_told_once(cluster: Cluster) -> None:
    before, after = config(entry("a")), config(entry("a", context=256))
    old, new = app_of(before.models[0], before), app_of(after.models[0], after)
    cluster.places, cluster.failing = 1, {new, old}
    change = run(serving(cluster, before), after)
    assert change.failed == {"a": "its replicas fail to start: it is broken"}
    assert cluster.settings is not None
    assert cluster.settings.apps == {"a": old}, "what Serve starts again, when it can"


def test_the_router_has_its_settings_only_when_serve_has_begun_with_them_and_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Serve tells the old status of a deployment until its controller's next turn, but the new one of an application at
    once."""
    told = iter([("DEPLOYING", "HEALTHY"), ("DEPLOYING", "UPDATING"), ("RUNNING", "HEALTHY"), ("never", "asked")])

    def applications() -> dict[str, Any]:
        status, router = next(told)
        deployments = {rollout.ROUTER_NAME: SimpleNamespace(status=router)}
        return {rollout.ROUTER_APP: SimpleNamespace(status=status, deployments=deployments)}

    monkeypatch.setattr(rollout, "POLL_S", 0.0)
    monkeypatch.setattr(rollout, "deploy", lambda targets: None)
    monkeypatch.setattr(rollout, "router_target", lambda settings: None)
    monkeypatch.setattr(rollout, "serve_applications", applications)
    before = config(entry("a"))
    rollout.deploy_router(RouterSettings(config=before, apps={}))
    assert next(told) == ("never", "asked")
