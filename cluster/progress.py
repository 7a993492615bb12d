"""Asking the artifact store, and showing how far its conversions are."""

from __future__ import annotations

from collections.abc import Sequence

import ray
from rich.console import Console

from cluster.artifact_store import Published, store_handle
from cluster.config import ArtifactsConfig
from cluster.conversion.wanted import Wanted
from cluster.display import ConversionDisplay, describe
from cluster.ray_errors import raised_here

POLL_S = 0.2


def ensure_artifacts(
    wanted: Sequence[Wanted], config: ArtifactsConfig, console: Console | None = None, with_chunks: bool = False
) -> list[Published]:
    """The artifacts, in order; converts what is missing, and shows how far it is. `with_chunks`: each is in the object
    store in the end, even one that a node has in its cache.

    Raises CheckpointError or ConversionError for the first that fails. `console` None: shows nothing.
    """
    store = store_handle()
    refs = [store.ensure.remote(each, config, with_chunks) for each in wanted]
    with ConversionDisplay(console) as display:
        pending = refs
        while pending:
            done, pending = ray.wait(pending, timeout=POLL_S)
            display.update(ray.get(store.progress.remote()))
            with raised_here():
                for ref in done:
                    published: Published = ray.get(ref)
                    where = "found in a node's cache" if published.chunks is None else "published"
                    display.say(f"{where} {describe(published.manifest)}")
    return ray.get(refs)  # type: ignore[no-any-return]
