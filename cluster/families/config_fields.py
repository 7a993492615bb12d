"""config.json, read field by field; and what its fields say against an engine."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError
from cluster.families.names import EngineName

NO_ENGINE = "no engine of this version runs it"
ENGINE_RUNS = "engine openvino runs it"


class Config:
    """The fields of config.json, or of an object in it. Where a method takes several names, the first that is present
    counts; null counts as absent. What cannot be read as it must raises CheckpointError, naming the field."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self._path = path  # for messages
        self._values = values
        self._prefix = ""  # of field names in messages
        self._obstacles: dict[EngineName, str] = {}

    @property
    def obstacles(self) -> tuple[tuple[EngineName, str], ...]:
        """By engine, what was hindered first."""
        return tuple(self._obstacles.items())

    def refuse(self, field: str, found: object, allowed: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {self._prefix}{field}: found {found!r:.200}, allowed is {allowed}")

    def hinder_bigdl(self, field: str, found: object, allowed: str) -> None:
        """Notes why engine bigdl cannot run this model; the first reason is kept."""
        self._obstacles.setdefault("bigdl", str(self.refuse(field, found, f"{allowed}; {ENGINE_RUNS}")))

    def get(self, *names: str, default: Any = None) -> tuple[str, Any]:
        for name in names:
            if self._values.get(name) is not None:
                return name, self._values[name]
        return names[0], default

    def is_null(self, name: str) -> bool:
        """Present, and null: for the fields in which transformers tells that from absent."""
        return name in self._values and self._values[name] is None

    def integer(self, *names: str, default: int | None = None, least: int = 1) -> int:
        name, value = self.get(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
            raise self.refuse(name, value, f"an integer from {least} to 2147483647")
        return value

    def positive(self, *names: str, default: float | None = None) -> float:
        name, value = self.get(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise self.refuse(name, value, "a number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        _, value = self.get(name, default=default)
        if not isinstance(value, bool):
            raise self.refuse(name, value, "true or false")
        return value

    def require(self, name: str, expected: object, *, default: object, why: str) -> None:
        _, value = self.get(name, default=default)
        if value != expected:
            raise self.refuse(name, value, f"{expected!r}: {why}; {NO_ENGINE}")

    def choice(self, *names: str, choices: tuple[str, ...], default: str) -> str:
        name, value = self.get(*names, default=default)
        if value not in choices:
            raise self.refuse(name, value, f"one of {', '.join(choices)}; {NO_ENGINE}")
        return str(value)

    def section(self, name: str) -> Config:
        """An object in config.json, empty where there is none; what hinders an engine there counts here."""
        _, values = self.get(name, default={})
        if not isinstance(values, dict):
            raise self.refuse(name, values, "an object")
        section = Config(self._path, values)
        section._prefix, section._obstacles = f"{self._prefix}{name}.", self._obstacles
        return section
