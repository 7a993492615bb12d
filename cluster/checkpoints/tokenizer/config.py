"""What the small files beside a tokenizer say: tokenizer_config.json, special_tokens_map.json, added_tokens.json,
the chat templates' files, and the token ids of generation_config.json and config.json.

As transformers reads them: special_tokens_map.json counts only where tokenizer_config.json has no added_tokens_decoder,
and the templates in tokenizer_config.json only where no template has a file of its own. Of several templates `default`
is for plain conversations, `tool_use` for those with tools; other names are never asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cluster.checkpoints.checkpoint_files import read_json_object, read_without_mark
from cluster.checkpoints.folder import CONFIG_FILE, TEMPLATE_FILES
from cluster.errors import CheckpointError

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_SPECIAL_TOKENS_FILE = "special_tokens_map.json"
_ADDED_TOKENS_FILE = "added_tokens.json"
ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class AddedToken(NamedTuple):
    """A token that is found in a text before the tokenizer's model sees it. `lstrip` and `rstrip`: the white space
    beside it belongs to it; `single_word`: it counts only between characters that are no part of a word."""

    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class TokenizerConfig(NamedTuple):
    """`names`: the text of special tokens by role (`bos_token`, ...), None where a file says null; a role that no file
    gives a text has no entry. `added`: by id. `template`: of conversations; `tool_template`: of those with tools, where
    it is another one. `flags`: the boolean fields."""

    names: dict[str, str | None]
    added: dict[int, AddedToken]
    template: str | None
    flags: dict[str, bool]
    tool_template: str | None = None


def read_tokenizer_config(folder: Path) -> TokenizerConfig:
    """Raises CheckpointError, naming the file and the field, for what has another form."""
    path = folder / TOKENIZER_CONFIG_FILE
    values = read_optional(path)
    added = dict(_decoder_entries(path, values))
    names = dict(_names(path, values))
    if "added_tokens_decoder" not in values:
        names |= dict(_names(folder / _SPECIAL_TOKENS_FILE, read_optional(folder / _SPECIAL_TOKENS_FILE)))
    for token, content in _added_texts(folder / _ADDED_TOKENS_FILE):
        added.setdefault(token, AddedToken(content, special=content in names.values()))
    flags = {name: value for name, value in values.items() if isinstance(value, bool)}
    template, tool_template = _templates(folder, values)
    return TokenizerConfig(names, added, template, flags, tool_template)


def configured_ids(folder: Path, role: Literal["bos", "eos"]) -> tuple[int, ...]:
    """The ids of this role in generation_config.json, then in config.json."""
    found = []
    for name in ("generation_config.json", CONFIG_FILE):
        value = read_optional(folder / name).get(f"{role}_token_id")
        found += [item for item in (value if isinstance(value, list) else [value]) if type(item) is int]
    return tuple(found)


def read_optional(path: Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    return read_json_object(path) if path.is_file() else {}


def _names(path: Path, values: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    """An empty text names no token: it counts as if it was not there."""
    for role in ROLES:
        if role not in values:
            continue
        value = values[role]
        content = value.get("content") if isinstance(value, dict) else value
        if content is not None and not isinstance(content, str):
            raise CheckpointError(
                f'{path}: {role}: found {value!r:.100}, allowed is a text, null or {{"content": a text}}'
            )
        if content != "":
            yield role, content


def _decoder_entries(path: Path, values: dict[str, Any]) -> Iterator[tuple[int, AddedToken]]:
    entries = values.get("added_tokens_decoder") or {}
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: added_tokens_decoder: found {entries!r:.100}, allowed is an object")
    for token, entry in entries.items():
        if not token.isdecimal() or not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise CheckpointError(
                f"{path}: added_tokens_decoder: found {token!r:.40}: {entry!r:.100}, allowed are token ids with"
                ' {"content": a text}'
            )
        flags = {name: entry.get(name) is True for name in ("special", "lstrip", "rstrip", "single_word")}
        yield int(token), AddedToken(entry["content"], **flags)


def _added_texts(path: Path) -> Iterator[tuple[int, str]]:
    for content, token in read_optional(path).items():
        if type(token) is not int or token < 0:
            raise CheckpointError(f"{path}: found id {token!r:.100} of {content!r:.40}, allowed are token ids")
        yield token, content


def _templates(folder: Path, values: dict[str, Any]) -> tuple[str | None, str | None]:
    """Of conversations, and of those with tools where another one is named for them."""
    named = _template_files(folder)
    if named:
        return _default_template(named, "the checkpoint"), named.get("tool_use")
    value, for_tools = values.get("chat_template"), None
    if isinstance(value, list):
        listed = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value, for_tools = _default_template(listed, TOKENIZER_CONFIG_FILE), listed.get("tool_use")
    for found in (value, for_tools):
        if found is not None and not isinstance(found, str):
            raise CheckpointError(
                f"{folder / TOKENIZER_CONFIG_FILE}: chat_template: found {found!r:.100}, allowed is a text, null or a"
                ' list of {"name": ..., "template": ...}'
            )
    return value, for_tools


def _template_files(folder: Path) -> dict[str, str]:
    """The templates that have a file, by name."""
    named = {}
    for file, name in TEMPLATE_FILES.items():
        path = folder / file
        if path.is_file():
            try:
                named[name] = read_without_mark(path).decode()
            except ValueError as error:
                raise CheckpointError(f"{path}: cannot be read as UTF-8: {error}") from error
    return named


def _default_template(named: Mapping[Any, Any], where: str) -> Any:
    """Of several templates, the one for plain conversations; where there is none, one that refuses them and says so."""
    names = ", ".join(str(name) for name in named).replace("'", "")
    missing = f"{{{{ raise_exception('{where} has no chat template named default, only {names}') }}}}"
    return named.get("default", missing)
