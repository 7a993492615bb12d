"""`nibble keys`: the file of API keys that `auth.api_keys_file` names.

The file belongs to people too: ruamel.yaml edits it, so that comments and order stay, and what comes out is read again
before it replaces the file.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import CommentMark, YAMLError
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.scalarstring import DoubleQuotedScalarString
from ruamel.yaml.tokens import CommentToken
from ruamel.yaml.util import load_yaml_guess_indent

from cluster.errors import ConfigError
from cluster.machine.home import expanded
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
        if entries:
            edited = KeysText(text, str(file))
            edited.append(values)
            text = edited.text()
        else:
            text = comments(text) + written(round_trip(), CommentedSeq([quoted(values)]))
        replace(file, text, (*entries, entry))
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
        left = entries[:index] + entries[index + 1 :]
        if left:
            edited = KeysText(text, str(file))
            edited.remove(index)
            text = edited.text()
        else:
            text = comments(text) + "[]\n"
        replace(file, text, left)


@contextmanager
def locked(file: Path) -> Iterator[Path]:
    """The file's own path, behind any link; two commands take turns. Raises ConfigError where it cannot be written."""
    try:
        file = expanded(file, "FILE").resolve()
        folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(folder)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be edited: {error}") from None


def comments(text: str) -> str:
    """The lines of comments, which are all that a file without entries has beside its `[]`. ruamel.yaml cannot write
    an empty list below a comment."""
    return "".join(f"{line}\n" for line in text.splitlines() if line.lstrip().startswith("#"))


class NullRepresenter(RoundTripRepresenter):
    """Writes None as `null`, as `nibble keys` always has, where ruamel.yaml leaves the value out."""

    def represent_none(self, data: None) -> Any:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


NullRepresenter.add_representer(type(None), NullRepresenter.represent_none)


def round_trip() -> YAML:
    yaml = YAML()
    yaml.Representer = NullRepresenter
    yaml.preserve_quotes = True
    yaml.width = 4096
    return yaml


def written(yaml: YAML, entries: CommentedSeq) -> str:
    output = StringIO()
    yaml.dump(entries, output)
    return output.getvalue()


def quoted(values: dict[str, Any]) -> CommentedMap:
    # A name such as `on` or `1e3` stays a text.
    return CommentedMap(
        (field, DoubleQuotedScalarString(value) if isinstance(value, str) else value) for field, value in values.items()
    )


class KeysText:
    """The text of a file with entries, for one change of them. Raises ConfigError for a file that ruamel.yaml would
    not write back as it is, white space aside."""

    def __init__(self, text: str, source: str) -> None:
        self._yaml = round_trip()
        self._yaml.explicit_start = any(line.startswith("---") for line in text.splitlines())
        try:
            self._entries, indent, offset = load_yaml_guess_indent(text, yaml=self._yaml)
            self._yaml.indent(sequence=indent or 2, offset=offset or 0)
            kept = not self._entries.fa.flow_style() and squeezed(self.text()) == squeezed(text)
        except YAMLError:
            kept = False
        if not kept:
            raise layout_error(source)

    def text(self) -> str:
        return written(self._yaml, self._entries)

    def append(self, values: dict[str, Any]) -> None:
        self._entries.append(quoted(values))
        # Comments at the end of the file stay before the new entry.
        self._put_comments(len(self._entries) - 1, self._entries.ca.end)
        self._entries.ca.end = []

    def remove(self, index: int) -> None:
        """Comments before and after the entry are not its own and stay, those inside it go."""
        entry, around = self._entries[index], self._entries.ca.items.get(index)
        before, last = (around[1] or [], around[0]) if around else ([], None)
        if not entry.fa.flow_style():
            last = entry.ca.items.get(list(entry)[-1], (None, None, None))[2]
        # One token holds the comment in the entry's last line and all lines of comments after it.
        after = last.value.partition("\n")[2] if last else ""
        del self._entries[index]
        self._put_comments(index, before + ([CommentToken(after, CommentMark(0))] if after else []))

    def _put_comments(self, index: int, tokens: list[CommentToken]) -> None:
        """Before the entry and the comments that it has, or at the end of the file."""
        if index == len(self._entries):
            self._entries.ca.end = tokens + self._entries.ca.end
            # ruamel.yaml writes the end's comments only of a list that has an object for those at its start.
            self._entries.ca.comment = self._entries.ca.comment or [None, []]
        elif tokens:
            around = self._entries.ca.items.setdefault(index, [None, None, None, None])
            around[1] = tokens + (around[1] or [])


def squeezed(text: str) -> str:
    return "".join(text.split())


def layout_error(source: str) -> ConfigError:
    return ConfigError(
        f"{source}: laid out in a way that `nibble keys` cannot edit; give each entry and each comment lines of its own"
    )


def replace(file: Path, text: str, wanted: tuple[KeyEntry, ...]) -> None:
    """At once: a router reads either file whole. Readable for its owner alone, or as it was. Raises ConfigError where
    the text does not mean what is wanted."""
    try:
        right = parse_keys(text, str(file)) == wanted
    except ConfigError:
        right = False
    if not right:
        raise layout_error(str(file))
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
