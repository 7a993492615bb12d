"""What the small files beside a tokenizer say: tokenizer_config.json, special_tokens_map.json, added_tokens.json,
chat_template.jinja, and the token ids of generation_config.json and config.json.

As transformers reads them: special_tokens_map.json counts only where tokenizer_config.json has no added_tokens_decoder,
and chat_template.jinja before the template in tokenizer_config.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cluster.checkpoints.checkpoint_files import read_json_object
from cluster.checkpoints.folder import CONFIG_FILE
from cluster.errors import CheckpointError

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_SPECIAL_TOKENS_FILE = "special_tokens_map.json"
_ADDED_TOKENS_FILE = "added_tokens.json"
_TEMPLATE_FILE = "chat_template.jinja"
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
    gives a text has no entry. `added`: by id. `template`: of conversations. `flags`: the boolean fields."""

    names: dict[str, str | None]
    added: dict[int, AddedToken]
    template: str | None
    flags: dict[str, bool]


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
    return TokenizerConfig(names, added, _template(folder, values), flags)


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


def _template(folder: Path, values: dict[str, Any]) -> str | None:
    path = folder / _TEMPLATE_FILE
    if path.is_file():
        try:
            return path.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read as UTF-8: {error}") from error
    value = values.get("chat_template")
    if isinstance(value, list):
        value = _default_template(value)
    if value is not None and not isinstance(value, str):
        raise CheckpointError(
            f"{folder / TOKENIZER_CONFIG_FILE}: chat_template: found {value!r:.100}, allowed is a text, null or a list"
            ' of {"name": ..., "template": ...}'
        )
    return value


def _default_template(templates: list[Any]) -> Any:
    """Of several templates, the one for plain conversations; where there is none, one that refuses them and says so."""
    named = {item.get("name"): item.get("template") for item in templates if isinstance(item, dict)}
    names = ", ".join(str(name) for name in named).replace("'", "")
    missing = f"{{{{ raise_exception('tokenizer_config.json has no chat template named default, only {names}') }}}}"
    return named.get("default", missing)
