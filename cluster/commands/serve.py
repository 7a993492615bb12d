"""`nibble serve`: convert, publish, deploy, show a first answer of each model, and stay until Ctrl-C."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import httpx
from ray.exceptions import RayError, RayTaskError
from rich.console import Console

from cluster.commands.preflight import (
    PlannedModel,
    check_fit_together,
    check_fits_any,
    plan_in_cluster,
    plan_models,
    report,
    this_node,
)
from cluster.commands.status import ask, deployment_state, ray_serve, running, serve_deployments, waiting_cpus
from cluster.config import ROUTER_NAME, ModelConfig, NibbleConfig
from cluster.conversion.wanted import Wanted
from cluster.errors import ConfigError, NibbleError
from cluster.families import FAMILIES
from cluster.isa import available_cores
from cluster.noted import noted
from cluster.ray_cluster import CONVERSION_CPUS, joined_cluster, local_cluster
from cluster.ray_errors import nibble_cause

if TYPE_CHECKING:
    from deployments.routing.greeting import FirstAnswer

POLL_S = 0.5
ANSWER_TIMEOUT_S = 30
FIRST_ANSWER_TOKENS = 12  # enough to see that it speaks: 64 take half a minute at 7 billion weights
FIRST_ANSWER_TIMEOUT_S = 120
# Between lines about a model whose state does not change.
FIRST_REPEAT_S, LAST_REPEAT_S = 15, 60


def serve(
    config: NibbleConfig, address: str | None, console: Console, verbose: bool = False, dry_run: bool = False
) -> None:
    """Returns after SIGINT or SIGTERM, with all that it started ended. Raises NibbleError for what cannot be served.
    `dry_run`: says what it would do, and does none of it."""
    say = console.print
    check_access(config, address is not None, say)
    if dry_run:
        for line in dry_run_report(config, address):
            say(line)
        return
    if address is None:
        check_local(config)
    with ExitStack() as stack:
        try:
            if address is None:
                ray_address = stack.enter_context(local_cluster(local_cpus(config, say), verbose))
            else:
                ray_address = stack.enter_context(joined_cluster(address, verbose))
            # After Ray has started, which takes SIGTERM for itself and then dies of it without ending its node.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            say(f"Ray cluster at {ray_address}")
            if address is not None:
                check_fits_any(*plan_in_cluster(config))
            from deployments.app import published_artifacts  # Serve reads the cluster's settings when it is imported

            wanted = published_artifacts(config, console)
            if address is not None:  # a node of our own ends with all that runs on it
                stack.callback(undeploy)
            deploy(config, wanted)
            url, grpc_address = addresses(config)
            stack.enter_context(noted(ray_address))
            wait_ready(config, say)
            wait_answering(url)
            say(f"\nHTTP {url}  gRPC {grpc_address}")
            greet(config, url, grpc_address, say)
            say("\nCtrl-C ends it.")
            signal.pause()
        except KeyboardInterrupt:
            # What was started must be ended, however often Ctrl-C is pressed.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            say("Stopping…")


def check_local(config: NibbleConfig) -> list[PlannedModel]:
    """Before anything is started. Raises NibbleError for what this machine cannot convert or has no memory for."""
    planned, node = plan_models(config), this_node()
    check_fits_any(planned, [node])
    check_fit_together(planned, node)
    return planned


def dry_run_report(config: NibbleConfig, address: str | None) -> list[str]:
    """Raises what `serve` would before it converts or loads anything."""
    if address is None:
        return report(check_local(config), [this_node()])
    with joined_cluster(address):
        planned, nodes = plan_in_cluster(config)
        check_fits_any(planned, nodes)
        return report(planned, nodes)


def check_access(config: NibbleConfig, joined: bool, say: Callable[[str], None]) -> None:
    """Before anything is started. Raises ConfigError for a keys' file that cannot be used; warns where strangers can
    ask without a key."""
    from deployments.api.access import load_keys

    host, keys_file = config.http.host, config.auth.api_keys_file
    if keys_file is not None:
        # In a cluster that is joined the file is on the router's node, which checks it too.
        if (not joined or keys_file.exists()) and not load_keys(keys_file):
            say(f"Warning: {keys_file} holds no key: every request will be refused.")
    elif not is_loopback(host):
        say(
            f"Warning: http.host is {host} and auth.api_keys_file is not set:"
            f" whoever reaches port {config.http.port} or {config.grpc.port} can use the models."
        )
    elif joined:
        # Serve takes no host for gRPC: its proxies bind to [::], but for HAProxy, which takes that of HTTP.
        say(
            f"Warning: auth.api_keys_file is not set: whoever reaches port {config.grpc.port} of this cluster's nodes"
            " can use the models, unless Ray was started with RAY_SERVE_ENABLE_HA_PROXY=1."
        )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def addresses(config: NibbleConfig) -> tuple[str, str]:
    """Where HTTP (a URL) and gRPC are reached."""
    host = f"[{config.http.host}]" if ":" in config.http.host else config.http.host
    return f"http://{host}:{config.http.port}", f"{host}:{config.grpc.port}"


def local_cpus(config: NibbleConfig, say: Callable[[str], None]) -> int:
    """How many CPUs the local Ray node shall count: its cores, or more where the models ask for more.

    Raises ConfigError for a model with more threads than this machine has cores.
    """
    cores = available_cores()
    for index, model in enumerate(config.models):
        if model.threads > cores:
            raise ConfigError(
                f"models[{index}].threads: found {model.threads}, this machine allows 1..{cores}"
                " (its cores, or the cgroup's CPU quota)"
            )
    if config.threads <= cores:
        return cores
    say(
        f"The models ask for {config.threads} threads in all, this machine has {cores} cores:"
        " their replicas share the cores evenly."
    )
    return config.threads + CONVERSION_CPUS


def deploy(config: NibbleConfig, wanted: Sequence[Sequence[Wanted]]) -> None:
    """Starts Serve with nibble's ports where it does not run yet, and deploys the application."""
    from deployments.app import application, grpc_options
    from deployments.ingress import APP_NAME

    serve = ray_serve()
    http = {"host": config.http.host, "port": config.http.port}
    serve.start(http_options=http, grpc_options=grpc_options(config.grpc.port))
    target = serve.RunTarget(application(config, wanted), name=APP_NAME, route_prefix="/")
    serve.run_many([target], wait_for_applications_running=False)


def undeploy() -> None:
    """Only nibble's application: Serve may have others in a cluster that was joined."""
    from deployments.ingress import APP_NAME

    ray_serve().delete(APP_NAME)


class StateLines:
    """What is said of models that start: each change of a model's state, and, while it is not ready, the same once more
    with the time, at intervals that double up to a minute. A replica of 7 billion weights takes minutes."""

    def __init__(self, say: Callable[[str], None]) -> None:
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


def wait_ready(config: NibbleConfig, say: Callable[[str], None]) -> None:
    """Until every model has its smallest number of replicas; says each change, what does not fit included."""
    lines = StateLines(say)
    waiting = {model.name for model in config.models}
    while waiting:
        deployments, waiting_for_cpus = serve_deployments(), waiting_cpus()
        for model in config.models:
            status = deployments.get(model.name)
            if status is None:
                continue
            if status.status == "DEPLOY_FAILED":
                raise NibbleError(f"{model.name}: its replicas fail to start: {status.message}")
            ready = running(status) >= model.replicas.min
            if ready:
                waiting.discard(model.name)
            state = deployment_state(status, model.threads, waiting_for_cpus)
            lines.show(model.name, state, ready, time.monotonic())
        time.sleep(POLL_S)


def wait_answering(url: str) -> None:
    """Until the router knows of the replicas. Raises NibbleError where nothing of nibble's listens at `url`: Serve ran
    in this cluster before, on another address."""
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while True:
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
            found = "it answers, but is not ready"
        except httpx.HTTPError as error:
            found = str(error)
        if time.monotonic() > deadline:
            raise NibbleError(f"{url}: {found}; does Serve listen on another host or port in this cluster?")
        time.sleep(POLL_S)


def greet(config: NibbleConfig, url: str, grpc_address: str, say: Callable[[str], None]) -> None:
    """One line to copy for each way in, and a first answer of each model; without the answers where a key is needed,
    which only its owner has."""
    keys = config.auth.api_keys_file
    header, variable = (' -H "Authorization: Bearer $NIBBLE_API_KEY"', "NIBBLE_API_KEY=… ") if keys else ("", "")
    first = config.models[0]
    prompt = demo_prompt(first)
    say("\nTry it:")
    say(
        f"  curl {url}/v1/completions{header} -H 'Content-Type: application/json'"
        f""" -d '{{"model": "{first.name}", "prompt": "{prompt}", "max_tokens": 64, "temperature": 0}}'"""
    )
    say(f"  {variable}nibble generate {first.name} '{prompt}' --grpc --url {grpc_address} --stream\n")
    if keys:
        say(f"Requests need an API key of {keys}, which `nibble serve` has none of: no first answers are shown.")
        return
    asyncio.run(show_first_answers(config.models, say))


async def show_first_answers(models: Sequence[ModelConfig], say: Callable[[str], None]) -> None:
    """All on one event loop, to which Serve's handles are bound. A model that cannot answer does not end the others."""
    for model in models:
        tokens, prompt = min(FIRST_ANSWER_TOKENS, model.context // 2), demo_prompt(model)
        try:
            answer = await ask(
                ROUTER_NAME, "first_answer", model.name, prompt, tokens, timeout_s=FIRST_ANSWER_TIMEOUT_S
            )
        except (RayError, asyncio.TimeoutError) as error:
            reason = (nibble_cause(error) if isinstance(error, RayTaskError) else None) or error
            say(f"{model.name}: no first answer: {reason or type(error).__name__}")
        else:
            say(f"{model.name}{greeting_line(answer, prompt)}")


def greeting_line(answer: FirstAnswer, prompt: str) -> str:
    """What follows the model's name."""
    if answer.first_token_s is None:
        return ": no first answer, since others are served" if answer.skipped else ": its first answer is empty"
    end = "… (ended for another request)" if answer.skipped else ""
    return f" (first token after {answer.first_token_s:.2f} s): {prompt}{answer.text}{end}"


def demo_prompt(model: ModelConfig) -> str:
    return FAMILIES[model.family].demo_prompt
