"""Where a checkpoint comes from: `builtin:FAMILY`, a folder, or a Hub repository `org/repo[@revision]`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cluster.checkpoints.folder import PlanningFolder, check_links
from cluster.errors import CheckpointError
from cluster.machine.home import expanded

BUILTIN_PREFIX = "builtin:"
DEMOS = Path(__file__).parents[1] / "demos"

_REPOSITORY = re.compile(r"^(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?$")


class Source(Protocol):
    """A checkpoint that was found. Every node that reads `pinned` as a source gets the same files."""

    @property
    def pinned(self) -> str:
        """The same checkpoint as a source again; a Hub repository with its commit."""

    def planning(self) -> AbstractContextManager[PlanningFolder]:
        """What plan_conversion and checkpoint_digest need; no weights are downloaded."""

    def files(self, names: Iterable[str]) -> Path:
        """A folder on this node that has at least these files, downloaded where they are not here yet."""


@dataclass(frozen=True)
class FolderSource:
    """Every node must see the folder under the same path."""

    pinned: str
    folder: Path

    def planning(self) -> AbstractContextManager[PlanningFolder]:
        check_links(self.folder)
        return nullcontext(PlanningFolder(self.folder, {}))

    def files(self, names: Iterable[str]) -> Path:
        return self.folder


@dataclass(frozen=True)
class HubSource:
    repo: str
    commit: str

    @property
    def pinned(self) -> str:
        return f"{self.repo}@{self.commit}"

    def planning(self) -> AbstractContextManager[PlanningFolder]:
        from cluster.checkpoints.hub.repository import planning_folder

        return planning_folder(self.repo, self.commit)

    def files(self, names: Iterable[str]) -> Path:
        from cluster.checkpoints.hub.repository import download

        return download(self.repo, self.commit, names)


def open_source(source: str) -> Source:
    """Asks the Hub only for what a branch or tag stands for now. Raises CheckpointError where there is no such
    checkpoint, saying what was looked for."""
    if source.startswith(BUILTIN_PREFIX):
        return FolderSource(source, builtin_checkpoint(source.removeprefix(BUILTIN_PREFIX)))
    folder = expanded(Path(source), "checkpoint")
    if folder.is_dir():
        return FolderSource(str(folder.absolute()), folder.absolute())
    repository = _REPOSITORY.match(source) if is_repository(source) else None
    if repository is None:
        raise CheckpointError(
            f"checkpoint: {source!r} is no folder on this node; allowed are a folder, org/repo[@revision] on the Hub"
            f" and {', '.join(BUILTIN_PREFIX + name for name in builtin_names())}"
        )
    from cluster.checkpoints.hub.repository import resolve_revision

    return HubSource(repository["repo"], resolve_revision(repository["repo"], repository["revision"]))


def is_repository(source: str) -> bool:
    """Whether this names a Hub repository; answered without asking the Hub."""
    named = not source.startswith((BUILTIN_PREFIX, ".")) and ".." not in source and _REPOSITORY.match(source)
    return bool(named) and not expanded(Path(source), "checkpoint").exists()


def builtin_names() -> list[str]:
    return sorted(path.parent.name for path in DEMOS.glob("*/config.json"))


def builtin_checkpoint(name: str) -> Path:
    if name not in builtin_names():
        raise CheckpointError(f"checkpoint: no built-in {name!r}; there are {', '.join(builtin_names())}")
    return DEMOS / name
