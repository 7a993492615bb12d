"""From what a cluster serves to what it shall serve: what changes, new replicas first, then the router, then the end of
what is no longer wanted. Nothing that is unchanged is touched."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rich.console import Console

from cluster.commands.status import (
    deployment_of,
    deployment_state,
    node_labels,
    ray_serve,
    router_settings,
    run,
    running,
    serve_applications,
    waiting_cpus,
)
from cluster.config import NibbleConfig
from cluster.conversion.wanted import Wanted
from cluster.errors import ConfigError, NibbleError
from cluster.model_config import ROUTER_APP, ROUTER_NAME, ModelConfig

if TYPE_CHECKING:
    from deployments.router_settings import RouterSettings

POLL_S = 0.5
# Between lines about a model whose state does not change.
FIRST_REPEAT_S, LAST_REPEAT_S = 15, 60
# Seconds that new replicas wait for free CPUs, before the old ones of the same model make room.
ROOM_S = 5
SETTLE_S = 60  # for the router to take up new settings

Say = Callable[[str], None]


class Change(NamedTuple):
    """Of one model. `replaced`: it gets new replicas. `fields`: what is different, as in the YAML file."""

    model: str
    kind: Literal["added", "changed", "removed"]
    replaced: bool = False
    fields: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.kind != "changed":
            return f"{self.model}: {self.kind}"
        how = "new replicas" if self.replaced else "without a restart"
        return f"{self.model}: {', '.join(self.fields) or 'the content of its checkpoint'} ({how})"


def changes(before: NibbleConfig | None, after: NibbleConfig) -> list[Change]:
    """Of the models, by their entries alone."""
    from deployments.app import replica_part

    old = {model.name: model for model in before.models} if before else {}
    found = []
    for model in after.models:
        earlier = old.pop(model.name, None)
        if earlier is None:
            found.append(Change(model.name, "added", replaced=True))
        elif fields := different(earlier, model):
            found.append(Change(model.name, "changed", replica_part(earlier) != replica_part(model), fields))
    return found + [Change(name, "removed") for name in old]


def different(before: ModelConfig | NibbleConfig, after: ModelConfig | NibbleConfig) -> tuple[str, ...]:
    """The keys whose values differ, with the values: `queue.max_queued: 64 to 8`."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    return tuple(differences(old, new))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in new:
        if old.get(key) == new[key] or key == "models":
            continue
        if isinstance(old.get(key), dict) and isinstance(new[key], dict):
            yield from differences(old[key], new[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}: {old.get(key)} to {new[key]}"


def refuse_others(settings: RouterSettings) -> None:
    """Raises ConfigError for a cluster whose applications come from a rendered file."""
    if any(settings.apps[model] == model for model in settings.apps):
        raise ConfigError(
            "this cluster was deployed from a rendered configuration (`serve deploy`, a RayService): render the new"
            " one with `nibble render` and deploy it the same way"
        )


def refuse_fixed(before: NibbleConfig, after: NibbleConfig) -> None:
    """Raises ConfigError for what belongs to Serve's proxies, which take it at their start."""
    for key in ("http", "grpc"):
        old, new = (getattr(each, key).model_dump(exclude={"cors_origins"}) for each in (before, after))
        if old != new:
            fields = ", ".join(different(before, after))
            raise ConfigError(f"{key}: cannot change while the cluster runs ({fields}); start it again for that")


class Rollout:
    """One change of what a cluster serves. `failed`: models that could not be converted or started, with the reason;
    what they were before goes on."""

    def __init__(self, config: NibbleConfig, before: RouterSettings | None, console: Console) -> None:
        self._config, self._before, self._console, self._say = config, before, console, console.print
        self._old_apps = dict(before.apps) if before else {}
        self._old_models = {model.name: model for model in before.config.models} if before else {}
        self._made_room: set[str] = set()  # models whose old replicas ended before the new ones ran
        self.failed: dict[str, str] = {}

    def run(self) -> None:
        from deployments.app import app_name, model_version

        wanted = self._converted()
        models = [model for model in self._config.models if model.name in wanted]
        artifacts = self._config.artifacts
        apps = {m.name: app_name(m, model_version(m, wanted[m.name], artifacts)) for m in models}
        self._deploy(models, wanted, apps)
        fresh = {name: app for name, app in apps.items() if app != self._old_apps.get(name)}
        self._wait({model: fresh[model.name] for model in models if model.name in fresh})
        apps = {name: app for name, app in apps.items() if name not in self.failed}
        self._switch(apps)
        if set(self._old_models) - {model.name for model in self._config.models}:
            wait_for_removed(self._config.limits.drain)
        used = set(apps.values()) | {self._old_apps[name] for name in self.failed if name in self._old_apps}
        for app in (set(self._old_apps.values()) | set(fresh.values())) - used:
            delete(app)

    def _converted(self) -> dict[str, list[Wanted]]:
        """The artifacts of each model. All at once; one by one only to find which of them fails."""
        from deployments.app import addressed

        models, artifacts = self._config.models, self._config.artifacts
        try:
            found = addressed(models, artifacts, self._console)
            return {model.name: wanted for model, wanted in zip(models, found, strict=True)}
        except NibbleError:
            if self._before is None:
                raise
        converted = {}
        for model in models:
            try:
                (converted[model.name],) = addressed([model], artifacts, self._console)
            except NibbleError as error:
                self._fail(model.name, str(error))
        return converted

    def _deploy(
        self, models: Sequence[ModelConfig], wanted: Mapping[str, Sequence[Wanted]], apps: Mapping[str, str]
    ) -> None:
        """Serve replaces nothing whose version is the same. The router's application is the first one that Serve sees:
        it waits in vain for proxies of one without a route (Ray 2.60)."""
        from deployments.app import grpc_options

        config, targets = self._config, []
        if self._before is None:
            http = {"host": config.http.host, "port": config.http.port}
            ray_serve().start(http_options=http, grpc_options=grpc_options(config.grpc.port))
            targets.append(router_target(self._settings(apps)))
        targets += [model_target(model, wanted[model.name], config, apps[model.name]) for model in models]
        deploy(targets)

    def _settings(self, apps: Mapping[str, str]) -> RouterSettings:
        """With what they were before for the models that failed."""
        from deployments.router_settings import RouterSettings

        kept = {name: self._old_models[name] for name in self.failed if name in self._old_models}
        models = [kept.get(m.name, m) for m in self._config.models if m.name in {*apps, *kept}]
        config = self._config.model_copy(update={"models": tuple(models)})
        return RouterSettings(config=config, apps={**apps, **{name: self._old_apps[name] for name in kept}})

    def _wait(self, apps: Mapping[ModelConfig, str]) -> None:
        """Until each model has its smallest number of replicas in its new application, or cannot have them."""
        lines, waiting, began = StateLines(self._say), dict(apps), time.monotonic()
        while waiting:
            applications, waiting_for_cpus, labels = serve_applications(), waiting_cpus(), node_labels()
            for model, app in list(waiting.items()):
                deployment = deployment_of(applications, app, model.deployment)
                if deployment is None:
                    continue
                if deployment.status == "DEPLOY_FAILED":
                    del waiting[model]
                    if restored := self._start_failed(model.name, app, deployment.message):
                        waiting[restored] = self._old_apps[model.name]
                    continue
                ready = running(deployment) >= model.replicas.min
                if ready:
                    del waiting[model]
                state = deployment_state(deployment, model, waiting_for_cpus, labels)
                lines.show(model.name, state, ready, time.monotonic())
                if not ready and waiting_for_cpus[model.threads] and time.monotonic() > began + ROOM_S:
                    self._make_room(model.name, app)
            time.sleep(POLL_S)

    def _start_failed(self, model: str, app: str, message: str) -> ModelConfig | None:
        """The old version, where it made room and is to be waited for again."""
        reason = f"its replicas fail to start: {message}"
        if self._before is None:
            raise NibbleError(f"{model}: {reason}")
        if model in self.failed:
            self._say(f"{model}: the old version cannot be restored: {reason}")
            return None
        self._fail(model, reason)
        if model not in self._made_room:
            return None
        self._restore(self._old_models[model], app)
        return self._old_models[model]

    def _make_room(self, model: str, app: str) -> None:
        """Once: the old replicas of a model end, and its requests wait for the new ones."""
        old = self._old_apps.get(model)
        if old is None or old == app or model in self._made_room:
            return
        self._say(f"{model}: no room beside the old replicas: requests wait for the new ones")
        self._made_room.add(model)
        self._move(model, app)
        delete(old)

    def _move(self, model: str, app: str) -> None:
        """The requests of this model alone, whose new replicas do not run yet: they wait for them."""
        assert self._before is not None, "there are old replicas"
        update = {"apps": {**self._before.apps, model: app}, "awaited": self._before.awaited | {model}}
        self._before = self._before.model_copy(update=update)
        deploy_router(self._before)

    def _restore(self, model: ModelConfig, failed_app: str) -> None:
        """The old version of a model that made room for one that does not start, which makes room in its turn."""
        from deployments.app import addressed

        assert self._before is not None, "there was an old version"
        config, app = self._before.config, self._old_apps[model.name]
        (wanted,) = addressed([model], config.artifacts)
        deploy([model_target(model, wanted, config, app)])
        self._move(model.name, app)
        delete(failed_app)

    def _switch(self, apps: Mapping[str, str]) -> None:
        settings = self._settings(apps)
        if self._before is not None and settings != self._before:
            deploy_router(settings)
            self._before = settings

    def _fail(self, model: str, reason: str) -> None:
        self.failed[model] = reason
        kept = "; the old version goes on" if model in self._old_apps else ""
        self._say(f"{model}: {reason}{kept}")


def deploy(targets: Sequence[Any]) -> None:
    """Returns at once."""
    ray_serve().run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def model_target(model: ModelConfig, wanted: Sequence[Wanted], config: NibbleConfig, app: str) -> Any:
    from deployments.app import model_application

    application = model_application(model, wanted, config.artifacts, config.limits)
    return ray_serve().RunTarget(application, name=app, route_prefix=None)


def router_target(settings: RouterSettings) -> Any:
    from deployments.app import router_application

    return ray_serve().RunTarget(router_application(settings), name=ROUTER_APP, route_prefix="/")


def deploy_router(settings: RouterSettings) -> None:
    """Returns once all of its replicas have the settings. Raises NibbleError where they do not take them up."""
    deploy([router_target(settings)])
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        time.sleep(POLL_S)
        applications = serve_applications()
        router = deployment_of(applications, ROUTER_APP, ROUTER_NAME)
        # The application's status changes at once, the deployment's own at the controller's next turn.
        if router is not None and router.status == "HEALTHY" and applications[ROUTER_APP].status == "RUNNING":
            return
    raise NibbleError(f"the router did not take up its settings within {SETTLE_S} s; `nibble status` shows its state")


def wait_for_removed(seconds: float) -> None:
    """Until all requests of models that were removed have begun, so many seconds at most: replicas that end take no
    further ones."""
    router = ray_serve().get_deployment_handle(ROUTER_NAME, ROUTER_APP)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = router.broadcast("removed_waiting").results(timeout_s=SETTLE_S, return_exceptions=True)
        if not any(count for count in found if isinstance(count, int)):  # a router that died has none
            return
        time.sleep(POLL_S)


def drain(settings: RouterSettings, say: Say) -> None:
    """Ends the router: it takes nothing new, and is gone when the requests in it have ended or `limits.drain_s` is
    over, after which their clients are told."""
    deploy_router(settings.model_copy(update={"draining": True}))
    delete(ROUTER_APP)
    told, began = False, time.monotonic()
    # Its deployments leave Serve's status before their replicas have ended; the application does not.
    while ROUTER_APP in serve_applications():
        if time.monotonic() > began + 2 and not told:
            told = True
            say(f"Requests in flight may go on for {settings.config.limits.drain:g} s; Ctrl-C ends them now.")
        time.sleep(0.1)


def delete(app: str) -> None:
    """Its replicas end when their requests have, or the time to drain is over."""
    ray_serve().delete(app, _blocking=False)


class StateLines:
    """What is said of models that start: each change of a model's state, and, while it is not ready, the same once more
    with the time, at intervals that double up to a minute. A replica of 7 billion weights takes minutes."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._states: dict[str, str] = {}
        self._began: dict[str, float] = {}  # by model, when it was first shown
        self._due: dict[str, float] = {}

    def show(self, model: str, state: str, ready: bool, now: float) -> None:
        """`now` in seconds."""
        began = self._began.setdefault(model, now)
        if self._states.get(model) != state:
            self._say(f"{model}: {state}")
            self._states[model], self._due[model] = state, now + FIRST_REPEAT_S
        elif not ready and now >= self._due[model]:
            self._say(f"{model}: {state} ({now - began:.0f} s)")
            self._due[model] = now + min(now - began, LAST_REPEAT_S)


def current_settings() -> RouterSettings | None:
    """What the cluster serves; None where there is no router. Raises NibbleError where that is not known."""
    return run(router_settings())
