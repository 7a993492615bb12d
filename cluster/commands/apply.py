"""`nibble apply`: brings a running cluster to a configuration, and says first what will change."""

from __future__ import annotations

from rich.console import Console

from cluster.commands.preflight import check_traces, checked_in_cluster
from cluster.commands.rollout import Rollout, changes, current_settings, different, refuse_fixed, refuse_others
from cluster.config import NibbleConfig
from cluster.errors import NibbleError


def apply(config: NibbleConfig, console: Console, dry_run: bool = False) -> None:
    """Of the cluster that this process is connected to. Converts first; then each model whose new replicas are ready
    takes over. Raises ConfigError for what cannot change, NibbleError for models that failed: they go on as before."""
    from deployments.app import check_keys

    check_keys(config)
    check_traces(config)
    before = current_settings()
    if before is not None:
        refuse_others(before)
        refuse_fixed(before.config, config)
    for change in changes(before.config if before else None, config):
        console.print(f"  {change}")
    for field in different(before.config, config) if before else ():
        console.print(f"  {field} (without a restart)")
    for note in checked_in_cluster(config):
        console.print(f"  {note}")
    if dry_run:
        return
    rollout = Rollout(config, before, console)
    rollout.run()
    if rollout.failed:
        raise NibbleError(f"not applied: {', '.join(sorted(rollout.failed))}")
    console.print("applied")
