"""API keys: who may ask, how many requests at once, and how many tokens a minute.

The keys' file is YAML, a list of entries such as `nibble keys add` appends:

    - {name: alice, sha256: 9f86d0…, max_concurrent: 4, tokens_per_minute: 60000}
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml
from pydantic import Field, TypeAdapter, ValidationError, field_validator

from cluster.artifacts.manifest import Record
from cluster.config import AuthConfig
from cluster.errors import ConfigError, RateLimitError, UnauthenticatedError
from cluster.serve_settings import SERVE_LOGGER

logger = logging.getLogger(SERVE_LOGGER)

KEY_PREFIX = "nbl-"
LOOK_S = 1.0  # the file is looked at no more often than that

Clock = Callable[[], float]
Stamp = tuple[int, ...] | None

Limit = Annotated[int, Field(ge=1, strict=True)]


class KeyEntry(Record):
    """One key. `sha256` is the key's plain SHA-256 in hex: a key is 256 random bits, which nobody finds by trying, so
    that the slow, salted hash that a password needs would only cost time at every request."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,62}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    max_concurrent: Limit | None = None
    tokens_per_minute: Limit | None = None

    @field_validator("name")
    @classmethod
    def no_key(cls, value: str) -> str:
        # Names are logged; a key put in the wrong place must not be.
        if value.startswith(KEY_PREFIX):
            raise ValueError(f"is a key; the name must not begin with {KEY_PREFIX}")
        return value


ENTRIES = TypeAdapter(tuple[KeyEntry, ...])


def hash_of(key: str) -> str:
    # Any text a client may send has a hash, lone surrogates included.
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def load_keys(path: Path) -> tuple[KeyEntry, ...]:
    """The entries of a keys' file. Raises ConfigError where it cannot be read or is not right in every entry."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; `nibble keys add` makes such a file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not valid UTF-8") from None
    return parse_keys(text, str(path))


def parse_keys(text: str, source: str) -> tuple[KeyEntry, ...]:
    """Raises ConfigError with the first thing that is wrong. It shows no value that was found: in a file with mistakes
    any of them may be a key or a hash, and the message goes to the log."""
    try:
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{source}: not valid YAML{line}") from None
    except yaml.YAMLError:
        raise ConfigError(f"{source}: not valid YAML") from None
    if not isinstance(values, list):
        # An empty file too: an editor that is about to write leaves one for a moment.
        raise ConfigError(f"{source}: found no list of keys; a file without any key holds []")
    try:
        entries = ENTRIES.validate_python(values)
    except ValidationError as error:
        detail = error.errors(include_input=False, include_url=False)[0]
        raise ConfigError(f"{source}: {entry_at(values, int(detail['loc'][0]))}{problem(detail)}") from None
    for field in ("name", "sha256"):
        first: dict[str, int] = {}
        for index, entry in enumerate(entries):
            before = first.setdefault(getattr(entry, field), index)
            if before != index:
                raise ConfigError(f"{source}: {entry_at(values, index)}: {field}: the same as entry {before + 1}'s")
    return entries


def entry_at(values: list[Any], index: int) -> str:
    """`entry 2 (alice)`; by the number alone where the name is not right."""
    try:
        name = KeyEntry(name=values[index]["name"], sha256="0" * 64).name
    except (TypeError, KeyError, ValidationError):
        return f"entry {index + 1}"
    return f"entry {index + 1} ({name})"


def problem(detail: Any) -> str:
    field = "".join(f": {part}" for part in detail["loc"][1:])
    if detail["type"] == "extra_forbidden":
        return f": unknown key; allowed are {', '.join(KeyEntry.model_fields)}"
    if detail["type"] == "missing":
        return f"{field}: missing, but required"
    if detail["type"] == "value_error":
        return f"{field}: {detail['ctx']['error']}"
    if detail["loc"][1:] == ("sha256",):
        return f"{field}: expected the key's SHA-256, 64 digits of 0-9 and a-f"
    return f"{field}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def bearer_key(authorization: str | None) -> str | None:
    """The key in an Authorization header, None where there is none."""
    scheme, _, key = (authorization or "").strip().partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


class KeyUse(NamedTuple):
    """What the requests of one router use of a key: how many are under way, and the tokens spent since it began."""

    ongoing: int
    spent: int


NOTHING = KeyUse(0, 0)
Uses = dict[str, KeyUse]  # by the key's name


class Holder:
    """What one key has under way, and what is left of its tokens. A bucket of one minute's tokens fills up all the
    time; tokens are paid for when they are there, so that a request may take the bucket below zero, and the next ones
    wait until it is above again. What other routers' requests use of the key counts as well, as far as it is known."""

    def __init__(self, entry: KeyEntry | None, clock: Clock) -> None:
        self.name = entry.name if entry else None
        self._clock = clock
        self._ongoing = self._spent = self._ongoing_elsewhere = 0
        self._max_ongoing = entry.max_concurrent if entry else None
        self._capacity = entry.tokens_per_minute if entry else None
        self._tokens = float(self._capacity or 0)
        self._filled_at = clock()

    def change(self, entry: KeyEntry) -> None:
        """To new limits; what is under way and owed stays."""
        self._fill()
        if entry.tokens_per_minute is not None:
            spent = self._capacity - self._tokens if self._capacity is not None else 0.0
            self._tokens = entry.tokens_per_minute - spent
        self._max_ongoing, self._capacity = entry.max_concurrent, entry.tokens_per_minute

    def enter(self) -> Admission:
        """Raises RateLimitError where a limit of the key is reached."""
        ongoing = self._ongoing + self._ongoing_elsewhere
        if self._max_ongoing is not None and ongoing >= self._max_ongoing:
            raise RateLimitError(
                f"API key {self.name}: {ongoing} requests are under way, max_concurrent is {self._max_ongoing};"
                " try again when one has ended"
            )
        self._fill()
        if self._capacity is not None and self._tokens <= 0:
            # Whole seconds, and the bucket must be above zero by then: at an even number of seconds it is just empty.
            wait = math.floor(-self._tokens * 60 / self._capacity) + 1
            raise RateLimitError(
                f"API key {self.name}: its {self._capacity} tokens a minute are used up; try again in {wait} s", wait
            )
        self._ongoing += 1
        return Admission(self)

    def spend(self, tokens: int) -> None:
        self._spent += tokens
        self._pay(tokens)

    def leave(self) -> None:
        self._ongoing -= 1

    def budget(self) -> dict[str, str]:
        """What is left of its tokens, as OpenAI's headers say it; nothing where they are not limited."""
        self._fill()
        if self._capacity is None:
            return {}
        until_full = math.ceil((self._capacity - self._tokens) * 60 / self._capacity)
        return {
            "x-ratelimit-limit-tokens": str(self._capacity),
            "x-ratelimit-remaining-tokens": str(max(0, math.floor(self._tokens))),
            "x-ratelimit-reset-tokens": f"{until_full}s",
        }

    @property
    def use(self) -> KeyUse:
        return KeyUse(self._ongoing, self._spent)

    def elsewhere(self, ongoing: int, newly_spent: int) -> None:
        """What other routers' requests hold now, and have spent since they were last asked."""
        self._ongoing_elsewhere = ongoing
        self._pay(newly_spent)

    def _pay(self, tokens: int) -> None:
        self._fill()
        if self._capacity is not None:
            self._tokens -= tokens

    def _fill(self) -> None:
        now = self._clock()
        if self._capacity is not None:
            gained = (now - self._filled_at) * self._capacity / 60
            self._tokens = min(float(self._capacity), self._tokens + gained)
        self._filled_at = now


class Admission:
    """One request's place among those of its key; left once, at the request's end."""

    def __init__(self, holder: Holder) -> None:
        self.key = holder.name
        self._holder = holder
        self._left = False

    def spend(self, tokens: int) -> None:
        self._holder.spend(tokens)

    def leave(self) -> None:
        if not self._left:
            self._left = True
            self._holder.leave()


class Access:
    """The keys in force, those of the file as it is now; everyone is admitted where the configuration names none. For
    use on one event loop. Raises ConfigError where the file cannot be used at the start."""

    def __init__(self, config: AuthConfig, clock: Clock = time.monotonic) -> None:
        self._file = config.api_keys_file
        self._clock = clock
        self._anyone = Holder(None, clock)
        self._holders: dict[str, Holder] = {}  # by name
        self._hashes: list[tuple[str, Holder]] = []
        self._stamp: Stamp = None  # of the file as the keys in force were read from it
        self._complaint: tuple[Stamp, str] | None = None  # logged already
        self._look_at = clock() + LOOK_S
        self._told: dict[str, Uses] | None = None  # by the other routers, which may be unheard for a while
        if self._file is not None:
            self._stamp = stamp_of(self._file)
            self._take(load_keys(self._file))

    def identify(self, presented: str | None) -> Holder:
        """Whose key it is. Raises UnauthenticatedError."""
        if self._file is None:
            return self._anyone
        self._look(self._file)
        if not presented:
            raise UnauthenticatedError("no API key was given; send the header `Authorization: Bearer KEY`")
        digest, found = hash_of(presented), None
        # All entries, whichever fits, each compared in constant time: the time taken tells nothing of any of them.
        for sha256, holder in self._hashes:
            if hmac.compare_digest(sha256, digest):
                found = holder
        if found is None:
            raise UnauthenticatedError("the API key is unknown; send a valid one as `Authorization: Bearer KEY`")
        return found

    def uses(self) -> Uses:
        """Of this router's requests."""
        return {name: holder.use for name, holder in self._holders.items() if any(holder.use)}

    def others(self, uses: Mapping[str, Uses]) -> None:
        """Counts in what the other routers' requests use, by router. What they had spent before the first call is not
        counted: it may be long ago."""
        before, self._told = self._told, {**(self._told or {}), **uses}
        for name, holder in self._holders.items():
            ongoing = spent = 0
            for router, told in uses.items():
                now = told.get(name, NOTHING)
                ongoing += now.ongoing
                if before is not None:
                    spent += max(0, now.spent - before.get(router, {}).get(name, NOTHING).spent)
            holder.elsewhere(ongoing, spent)

    def _look(self, file: Path) -> None:
        """Takes up a file that has changed. With one that cannot be used the keys read before stay in force: a mistake
        must neither open the door nor shut everyone out. It is tried again, but logged once."""
        now = self._clock()
        if now < self._look_at:
            return
        self._look_at = now + LOOK_S
        stamp = stamp_of(file)
        if stamp == self._stamp:
            self._complaint = None
            return
        try:
            entries = load_keys(file)
        except ConfigError as error:
            if self._complaint != (stamp, str(error)):
                self._complaint = stamp, str(error)
                logger.error("API keys: %s; the keys read before stay in force", error)
            return
        self._stamp, self._complaint = stamp, None
        self._take(entries)

    def _take(self, entries: tuple[KeyEntry, ...]) -> None:
        before, self._holders = self._holders, {}
        for entry in entries:
            holder = before.get(entry.name)
            if holder is None:
                holder = Holder(entry, self._clock)
            else:
                holder.change(entry)
            self._holders[entry.name] = holder
        self._hashes = [(entry.sha256, self._holders[entry.name]) for entry in entries]


def stamp_of(file: Path) -> Stamp:
    """Differs whenever the file was written, replaced or became readable; None where it is not there."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
