"""Opening the files of a checkpoint, so that what cannot be read is told with the file's name and what to do."""

from __future__ import annotations

import json
from io import BufferedReader
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError

# A repository cloned without git-lfs has, in the place of each large file, a text of three lines that begins so.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


def open_binary(path: Path) -> BufferedReader:
    """Raises CheckpointError where the file cannot be read, or is only Git LFS's pointer to it."""
    try:
        file = path.open("rb")
        begins = file.peek(len(_LFS_POINTER))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if begins.startswith(_LFS_POINTER):
        file.close()
        raise CheckpointError(
            f"{path}: found a Git LFS pointer, not the file that it stands for: run 'git lfs pull' in the folder, or"
            " download the checkpoint again"
        )
    return file


def read_json_object(path: Path) -> dict[str, Any]:
    """Of UTF-8 without a byte order mark, as transformers reads every JSON file of a checkpoint. Raises CheckpointError
    for anything else."""
    with open_binary(path) as file:
        content = file.read()
    if content.startswith(_BYTE_ORDER_MARKS):
        raise CheckpointError(
            f"{path}: not JSON: begins with a byte order mark, which transformers does not read: save it as UTF-8"
            " without one"
        )
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}: download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: found a JSON {type(value).__name__}, allowed is an object")
    return value
