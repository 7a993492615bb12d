"""What starts a server, changes it and looks at it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.options import Address, DryRun, plain_console
from cluster.config import default_config, load_config

app = typer.Typer()


@app.command()
def serve(
    config: Annotated[Path | None, typer.Argument(help="YAML. Without it: the four built-in demo models.")] = None,
    address: Address = None,
    verbose: Annotated[bool, typer.Option(help="Show the log of Ray's workers.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Convert the models, deploy them and serve HTTP and gRPC until Ctrl-C."""
    from cluster.commands.serve import serve

    load = partial(load_config, config) if config else default_config
    serve(load, address, plain_console(), verbose, dry_run)


@contextmanager
def running_cluster(address: str | None) -> Iterator[None]:
    """A connection to the cluster at an address, by default the one that `nibble serve` runs on this machine."""
    from cluster.noted import noted_address

    address = address or noted_address()  # before Ray is imported
    from cluster.ray_cluster import joined_cluster

    with joined_cluster(address):
        yield


@app.command()
def apply(
    config: Annotated[Path, typer.Argument(help="YAML, as for `nibble serve`.")],
    address: Address = None,
    dry_run: DryRun = False,
) -> None:
    """Bring a running cluster to a configuration. Only what differs changes; no request is lost."""
    wanted = load_config(config)
    with running_cluster(address):
        from cluster.commands.apply import apply

        apply(wanted, plain_console(), dry_run)


@app.command()
def render(
    config: Annotated[Path, typer.Argument(help="YAML, as for `nibble serve`.")],
    rayservice: Annotated[
        str | None, typer.Option(help="Print a patch for the KubeRay RayService of this name.")
    ] = None,
    settings: Annotated[
        bool, typer.Option("--settings", help="Print what Ray's processes need set, NAME=VALUE.")
    ] = False,
) -> None:
    """Print the same configuration for `serve deploy`, or a RayService's serveConfigV2."""
    wanted = load_config(config)
    from cluster.commands.render import rayservice_patch, serve_config, settings_file

    if settings:
        text = settings_file(wanted)
    else:
        text = serve_config(wanted) if rayservice is None else rayservice_patch(wanted, rayservice)
    print(text, end="")


@app.command()
def drain(
    config: Annotated[Path, typer.Argument(help="YAML, as for `nibble serve`: its limits bound the time.")],
    address: Annotated[str | None, typer.Option(help="A running Ray cluster, HOST:PORT. Default: RAY_ADDRESS.")] = None,
    node: Annotated[str | None, typer.Option(help="Address of the node to drain. Default: this one.")] = None,
) -> None:
    """End a Ray node's replicas, which start elsewhere first, and wait for its requests. For a pod's preStop hook."""
    limits = load_config(config).limits
    from cluster.commands.drain import GcsCluster, drain, ray_address, this_address

    gcs_address = ray_address(address)
    cluster = GcsCluster(gcs_address)
    drain(cluster, node or this_address(cluster.alive(), gcs_address), limits, plain_console().print)


@app.command()
def status(address: Address = None) -> None:
    """Nodes, replicas, conversions and artifacts of a cluster, and what it waits for."""
    with running_cluster(address):
        from cluster.commands.status import status

        status(plain_console())


@app.command()
def tune(
    config: Annotated[Path, typer.Argument(help="YAML, as for `nibble serve`.")],
    model: Annotated[str | None, typer.Argument(help="Which of its models. Default: the only one.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Clients, which the replicas share evenly.")] = 8,
    requests: Annotated[int | None, typer.Option(min=1, help="Of each round. Default: 2 a client.")] = None,
    input_tokens: Annotated[int, typer.Option(min=1, help="Of each prompt, no two the same.")] = 64,
    output_tokens: Annotated[int, typer.Option(min=2, help="Of each completion.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="The table has their medians.")] = 3,
    write: Annotated[bool, typer.Option("--write", help="Write the best split into CONFIG.")] = False,
) -> None:
    """Try replicas x threads of a model on this node: tokens/s and latency of each split of its cores."""
    from cluster.commands.tune import tune
    from deployments.engines.measure import EngineLoad

    load = EngineLoad(
        concurrency=concurrency,
        requests=requests or 2 * concurrency,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
    )
    tune(config, model, load, rounds, write, plain_console())
