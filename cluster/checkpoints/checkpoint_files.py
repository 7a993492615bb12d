"""Opening the files of a checkpoint, so that what cannot be read is told with the file's name and what to do."""

from __future__ import annotations

import codecs
import json
from io import BufferedReader
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError

# A repository cloned without git-lfs has, in the place of each large file, a text of three lines that begins so.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_UTF_8_MARK, _UTF_16_MARKS = codecs.BOM_UTF8, (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


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


def read_without_mark(path: Path) -> bytes:
    """The content of a file of text, without the byte order mark that some editors put before UTF-8. The libraries that
    read such files (tokenizers, transformers) refuse it. Raises CheckpointError as open_binary does, and for UTF-16."""
    with open_binary(path) as file:
        content = file.read()
    if content.startswith(_UTF_16_MARKS):
        raise CheckpointError(f"{path}: found UTF-16, allowed is UTF-8: save it as that")
    return content.removeprefix(_UTF_8_MARK)


def read_json_object(path: Path) -> dict[str, Any]:
    """Of UTF-8, with or without a byte order mark. Raises CheckpointError for anything else."""
    content = read_without_mark(path)
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}: download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: found a JSON {type(value).__name__}, allowed is an object")
    return value
