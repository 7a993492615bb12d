"""The families nibble serves: one file each, and here what is asked of all of them."""

from __future__ import annotations

from collections.abc import Callable

from cluster.errors import ConfigError
from cluster.families import bloom, gptneox, llama, starcoder
from cluster.families.family import Family
from cluster.families.names import ENGINE_NAMES, FAMILY_NAMES, EngineName, FamilyName

__all__ = [
    "ELSEWHERE",
    "ENGINE_NAMES",
    "FAMILIES",
    "FAMILY_NAMES",
    "EngineName",
    "Family",
    "FamilyName",
    "architecture_names",
    "family_named",
    "fitting_family",
]

FAMILIES: dict[FamilyName, Family] = {
    module.FAMILY.name: module.FAMILY for module in (llama, gptneox, bloom, starcoder)
}

# Of no family, though the same models exist in a form that is: the architecture, and what to take instead.
ELSEWHERE = {
    "GPT2LMHeadCustomModel": "bigcode/gpt_bigcode-santacoder has santacoder in the form of family starcoder: take that",
}


def fitting_family(model_type: object, architectures: object) -> FamilyName | None:
    """The family whose model transformers would make of a config.json. It goes by `model_type`, so that alone decides
    where it is given; but the architectures must be of some family too, or the weights are another model's (with a
    classifier in the place of the output matrix, for instance)."""
    by_type = _first(lambda family: _same(model_type, family.model_types))
    names = architecture_names(architectures)
    by_name = _first(lambda family: any(_same(name, family.architectures) for name in names))
    if names and by_name is None:
        return None
    return by_name if model_type is None else by_type


def architecture_names(architectures: object) -> list[str]:
    """Those in config.json's "architectures", none where it is no list."""
    return [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []


def _first(fits: Callable[[Family], bool]) -> FamilyName | None:
    return next((family.name for family in FAMILIES.values() if fits(family)), None)


def _same(found: object, known: tuple[str, ...]) -> bool:
    return isinstance(found, str) and found.lower() in {name.lower() for name in known}


def family_named(name: str) -> Family:
    """Raises ConfigError for a name that is no family."""
    for family in FAMILIES.values():
        if family.name == name:
            return family
    raise ConfigError(f"family: found {name!r}, allowed are {', '.join(FAMILY_NAMES)}")
