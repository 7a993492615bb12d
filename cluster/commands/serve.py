"""`nibble serve`: convert, publish, deploy, show a first answer of each model, and stay until Ctrl-C."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
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
    check_traces,
    checked_in_cluster,
    plan_in_cluster,
    plan_models,
    report,
    this_node,
    thread_notes,
)
from cluster.commands.status import ask, run
from cluster.config import NibbleConfig
from cluster.errors import ConfigError, NibbleError
from cluster.families import FAMILIES
from cluster.machine.home import is_writable
from cluster.machine.isa import available_cores
from cluster.model_config import ROUTER_APP, ROUTER_NAME, ModelConfig
from cluster.noted import noted
from cluster.ray_cluster import joined_cluster, local_cluster
from cluster.ray_errors import nibble_cause

if TYPE_CHECKING:
    from deployments.routing.greeting import FirstAnswer

POLL_S = 0.5
ANSWER_TIMEOUT_S = 120  # the router may still start when all models are ready
FIRST_ANSWER_TOKENS = 12  # enough to see that it speaks: 64 take half a minute at 7 billion weights
FIRST_ANSWER_TIMEOUT_S = 120
LOOK_S = 0.5  # until a configuration that is to be loaded again is


def serve(
    load: Callable[[], NibbleConfig],
    address: str | None,
    console: Console,
    verbose: bool = False,
    dry_run: bool = False,
) -> None:
    """Starts Ray or joins it, brings it to the configuration, and stays. Returns after SIGINT or SIGTERM, with all that
    it started ended; at SIGHUP it loads the configuration again and applies it. Raises NibbleError for what cannot be
    served. `dry_run`: says what it would do, and does none of it."""
    config = load()
    say = console.print
    check_access(config, address is not None, say)
    check_traces(config)
    if dry_run:
        for line in dry_run_report(config, address):
            say(line)
        return
    if address is None:
        for note in thread_notes(check_local(config), [this_node()]):
            say(note)
    with ExitStack() as stack:
        try:
            if address is None:
                listens = (config.http.port, config.grpc.port)
                cluster = local_cluster(local_cpus(config, say), verbose, config.limits, listens)
                ray_address = stack.enter_context(cluster)
            else:
                ray_address = stack.enter_context(joined_cluster(address, verbose))
            # After Ray has started, which takes SIGTERM for itself and then dies of it without ending its node.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            say(f"Ray cluster at {ray_address}")
            if address is not None:
                for note in checked_in_cluster(config):
                    say(note)
            # Serve reads the cluster's settings when it is imported.
            from cluster.commands.rollout import Rollout

            if address is not None:  # a node of our own ends with all that runs on it
                stack.callback(undeploy)
            stack.enter_context(noted(ray_address))
            Rollout(config, None, console).run()
            url, grpc_address = addresses(config)
            wait_answering(url)
            say(f"\nHTTP {url}  gRPC {grpc_address}")
            greet(config, url, grpc_address, say)
            say("\nCtrl-C ends it.")
            stay(load, console)
        except KeyboardInterrupt:
            say("Stopping…")
            stop(say)


def stay(load: Callable[[], NibbleConfig], console: Console) -> None:
    """Until SIGINT or SIGTERM. A configuration that cannot be applied changes nothing."""
    from cluster.commands.apply import apply

    asked = False

    def ask_for_it(*_: object) -> None:
        nonlocal asked
        asked = True

    signal.signal(signal.SIGHUP, ask_for_it)
    while True:
        time.sleep(LOOK_S)
        if asked:
            asked = False
            try:
                apply(load(), console)
            except NibbleError as error:
                console.print(f"SIGHUP: {error}")


def stop(say: Callable[[str], None]) -> None:
    """Lets the requests in flight end. Whoever does not want to wait sends the signal again; what was started is ended
    then, however often that comes."""
    from cluster.commands.rollout import current_settings, drain

    try:
        settings = current_settings()
        if settings is not None:
            drain(settings, say)
    except KeyboardInterrupt:
        say("Ending the requests in flight…")
    except Exception as error:  # noqa: BLE001 - whatever state the cluster is in, it is to end
        say(f"The requests in flight are not waited for: {error}")
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def check_local(config: NibbleConfig) -> list[PlannedModel]:
    """Before anything is started. Raises NibbleError for ports in use, a cache that cannot be written, and for what
    this machine cannot convert or has no memory for."""
    check_ports(config)
    if not is_writable(cache := config.artifacts.cache_dir):
        raise ConfigError(f"artifacts.cache_dir: {cache} cannot be written; give a folder that can be")
    planned, node = plan_models(config), this_node()
    check_fits_any(planned, [node])
    check_fit_together(planned, node)
    return planned


def check_ports(config: NibbleConfig) -> None:
    """Raises ConfigError for a port that something else listens on."""
    for key, port in (("http.port", config.http.port), ("grpc.port", config.grpc.port)):
        try:
            found = socket.getaddrinfo(config.http.host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise ConfigError(f"http.host: {config.http.host!r} is no address of this machine: {error}") from None
        family, kind, _, _, address = found[0]
        with socket.socket(family, kind) as probe:
            # As HAProxy binds: connections of a server that has ended do not keep its port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                raise ConfigError(
                    f"{key}: {port} on {config.http.host} cannot be used: {error.strerror}; end what listens there, or"
                    " choose another one"
                ) from None


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
    """How many CPUs the local Ray node shall count, for replicas alone: for all that the models may have and as much
    again, so that new versions run beside the old ones, but not less than its cores.

    Raises ConfigError for a model with more threads than this machine has cores.
    """
    cores = available_cores()
    for index, model in enumerate(config.models):
        if model.threads > cores:
            raise ConfigError(
                f"models[{index}].threads: found {model.threads}, this machine allows 1..{cores}"
                " (its cores, or the cgroup's CPU quota)"
            )
    if config.threads > cores:
        say(
            f"The models ask for {config.threads} threads in all, this machine has {cores} cores:"
            " their replicas share the cores evenly."
        )
    return max(cores, 2 * sum(model.threads * model.replicas.max for model in config.models))


def undeploy() -> None:
    """Only nibble's applications: Serve may have others in a cluster that was joined."""
    from cluster.commands.rollout import current_settings, delete

    settings = current_settings()
    for app in (ROUTER_APP, *(settings.apps.values() if settings else ())):
        delete(app)


def wait_answering(url: str) -> None:
    """Until the router knows of the replicas. Raises NibbleError where nothing of nibble's listens at `url`: Serve ran
    in this cluster before, on another address."""
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while True:
        try:
            if httpx.get(f"{url}/readyz", timeout=5, trust_env=False).status_code == 200:
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
    run(show_first_answers(config.models, say))


async def show_first_answers(models: Sequence[ModelConfig], say: Callable[[str], None]) -> None:
    """A model that cannot answer does not end the others. What only a request starts is not asked."""
    for model in models:
        if model.replicas.min == 0:
            say(f"{model.name}: no first answer: its first request starts a replica (replicas.min is 0)")
            continue
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
