"""`nibble keys`: the file of API keys that `auth.api_keys_file` names.

The file belongs to people too: its text is edited in place, comments and order stay, and what comes out is read again
before it replaces the file.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from cluster.errors import ConfigError
from deployments.api.access import KEY_PREFIX, KeyEntry, hash_of, load_keys, parse_keys

HEADER = "# API keys of nibble: only their hashes. `nibble keys` edits this file; a running router reads it again.\n"


def add_key(file: Path, name: str, max_concurrent: int | None, tokens_per_minute: int | None) -> str:
    """The new key, which is kept nowhere. Raises ConfigError for a wrong or taken name, or a file that is not right."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    values = {
        "name": name,
        "sha256": hash_of(key),
        "max_concurrent": max_concurrent,
        "tokens_per_minute": tokens_per_minute,
    }
    with locked(file) as file:
        text = file.read_text(encoding="utf-8") if file.exists() else HEADER + "[]\n"
        entries = parse_keys(text, str(file))
        if any(entry.name == name for entry in entries):
            raise ConfigError(f"{file}: {name} has a key already; remove it first, or choose another name")
        try:
            entry = KeyEntry.model_validate(values)
        except ValidationError:
            raise ConfigError(
                f"name: found {name!r}; expected letters, digits and any of ._@- (63 at most), not a key itself"
            ) from None
        lines = text.splitlines() if entries else comments(text)
        lines += entry_lines(values, indentation(lines))
        replace(file, lines, (*entries, entry))
    return key


def list_keys(file: Path, console: Console) -> None:
    table = Table("name", "max_concurrent", "tokens_per_minute")
    for entry in load_keys(file):
        limits = (entry.max_concurrent, entry.tokens_per_minute)
        table.add_row(entry.name, *("no limit" if limit is None else str(limit) for limit in limits))
    console.print(table)


def remove_key(file: Path, name: str) -> None:
    """Raises ConfigError where there is no such key."""
    with locked(file) as file:
        entries = load_keys(file)
        index = next((index for index, entry in enumerate(entries) if entry.name == name), None)
        if index is None:
            raise ConfigError(f"{file}: no key of the name {name}; `nibble keys list` shows which there are")
        text = file.read_text(encoding="utf-8")
        first, last = lines_of(text, index)
        lines = text.splitlines()
        del lines[first : last + 1]
        left = entries[:index] + entries[index + 1 :]
        replace(file, lines if left else [*comments("\n".join(lines)), "[]"], left)


@contextmanager
def locked(file: Path) -> Iterator[Path]:
    """The file's own path, behind any link; two commands take turns. Raises ConfigError where it cannot be written."""
    try:
        file = file.expanduser().resolve()
        folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(folder)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be edited: {error}") from None


def comments(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.lstrip().startswith("#")]


def indentation(lines: list[str]) -> str:
    return next((found[1] for line in lines if (found := re.match(r"( *)- ", line))), "")


def entry_lines(values: dict[str, Any], indent: str) -> list[str]:
    # In JSON, which is YAML: a name such as `on` or `1e3` stays a text.
    fields = [f"{field}: {json.dumps(value)}" for field, value in values.items()]
    return [f"{indent}{'  ' if index else '- '}{field}" for index, field in enumerate(fields)]


def lines_of(text: str, index: int) -> tuple[int, int]:
    """The first and the last line of an entry; comments after it are not its own."""
    entries: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    entry = entries.value[index]
    ends = [entry] if entry.flow_style else [part for field in entry.value for part in field]
    return entry.start_mark.line, max(end.end_mark.line for end in ends)


def replace(file: Path, lines: list[str], wanted: tuple[KeyEntry, ...]) -> None:
    """At once: a router reads either file whole. Readable for its owner alone, or as it was. Raises ConfigError where
    the text does not mean what is wanted, with a file that was laid out in another way than `nibble keys` does."""
    text = "\n".join(lines) + "\n"
    try:
        right = parse_keys(text, str(file)) == wanted
    except ConfigError:
        right = False
    if not right:
        raise ConfigError(f"{file}: laid out in a way that `nibble keys` cannot edit; give each entry lines of its own")
    handle, temporary = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    try:
        with open(handle, "w", encoding="utf-8") as output:
            if file.exists():
                was = file.stat()
                os.fchown(handle, was.st_uid, was.st_gid)
                os.fchmod(handle, was.st_mode & 0o777)
            output.write(text)
            output.flush()
            os.fsync(handle)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise
