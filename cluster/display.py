"""The progress of conversions: a bar on a terminal, a plain line an event elsewhere. Needs no Ray."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from cluster.artifacts.manifest import Manifest, Record

PLAIN_LINE_S = 5.0


class ConversionProgress(Record):
    """`bytes` of the artifact, and how many of them each node has converted."""

    source: str
    stage: Literal["convert", "check"]
    bytes: int
    nodes: dict[str, int]

    @property
    def bytes_done(self) -> int:
        return sum(self.nodes.values())


class ConversionDisplay:
    """On a terminal a bar for each conversion and for each node's part of it; elsewhere a line every few seconds."""

    def __init__(self, console: Console | None) -> None:
        self._console = console
        self._plain = console is not None and not console.is_terminal
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),  # builtin:llama: is no emoji
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=console is None or self._plain,
        )
        self._tasks: dict[str, TaskID] = {}
        self._started = self._next_line = time.monotonic()

    def __enter__(self) -> ConversionDisplay:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def say(self, line: str) -> None:
        if self._console is not None:
            self._console.print(line)

    def update(self, conversions: Sequence[ConversionProgress]) -> None:
        for progress in conversions:
            self._bar(progress.source, f"{progress.stage} {progress.source}", progress.bytes_done, progress.bytes)
            for node, done in sorted(progress.nodes.items()):
                self._bar(f"{progress.source} {node}", f"  on {node}", done, progress.bytes)
        if self._plain and conversions and time.monotonic() >= self._next_line + PLAIN_LINE_S:
            self._next_line = time.monotonic()
            for progress in conversions:
                self.say(plain_line(progress, self._next_line - self._started))

    def _bar(self, key: str, description: str, done: int, total: int) -> None:
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(description, total=total)
        self._bars.update(self._tasks[key], description=description, completed=done)


def plain_line(progress: ConversionProgress, seconds: float) -> str:
    speed = progress.bytes_done / seconds if seconds > 0 else 0
    left = f"{(progress.bytes - progress.bytes_done) / speed:.0f} s left" if speed else "starting"
    nodes = ", ".join(f"{node} {done / 1e6:.0f} MB" for node, done in sorted(progress.nodes.items()))
    return (
        f"{progress.stage} {progress.source}: {progress.bytes_done / 1e6:.0f} of {progress.bytes / 1e6:.0f} MB,"
        f" {speed / 1e6:.0f} MB/s, {left}" + (f" ({nodes})" if nodes else "")
    )


def describe(manifest: Manifest) -> str:
    return (
        f"{manifest.source}: {manifest.family} {manifest.quantization}, {manifest.bytes / 1e6:.1f} MB in"
        f" {len(manifest.chunks)} chunk(s), artifact {manifest.artifact_id}, for engine {' or '.join(manifest.engines)}"
    )
