"""Paths below a home folder, which a user of a container need not have."""

from __future__ import annotations

import os
from pathlib import Path

from cluster.errors import ConfigError


def expanded(path: Path, field: str) -> Path:
    """The path with its `~` replaced. Raises ConfigError, naming the field or file, where that folder is not known."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{field}: found {path}, but no home folder is known (HOME is not set, and user {os.getuid()} has none):"
            " set HOME, or give a path without ~"
        ) from None


def is_writable(folder: Path) -> bool:
    """Whether this user can make files in it, or make the folder itself."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)
