"""Rotary position embeddings as config.json describes them, in transformers 4's words or in transformers 5's."""

from __future__ import annotations

from typing import Literal, NamedTuple

from cluster.families.config_fields import NO_ENGINE, Config

RotaryKind = Literal["default", "linear", "llama3"]

BIGDL_BASE = 10000.0

# The numbers by which transformers changes the frequencies of each kind.
_SCALING: dict[RotaryKind, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


class Rotary(NamedTuple):
    """The first `width` numbers of a head are rotated, by position times base ** (-2i / width) for i from 0 to
    width / 2. `kind` and the numbers in `scaling` say how these frequencies are changed, as ROPE_INIT_FUNCTIONS of
    transformers has it."""

    width: int
    base: float
    scaling: tuple[tuple[str, float], ...] = ()
    kind: RotaryKind = "default"


def read_rotary(config: Config, width: int, base_name: str) -> Rotary:
    """transformers 4 writes `base_name` and `rope_scaling`, transformers 5 `rope_parameters`."""
    name, section = _section(config)
    base = _base(config, section, base_name)
    kind = _kind(section)
    scaling = tuple((field, _scaling_number(config, section, field)) for field in _SCALING[kind])
    numbers = dict(scaling)
    if kind == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        allowed = f"one above low_freq_factor, {numbers['low_freq_factor']}"
        raise section.refuse("high_freq_factor", numbers["high_freq_factor"], allowed)
    if kind != "default":
        config.hinder_bigdl(name, config.get(name)[1], "no scaling: the runtime ignores it")
    return Rotary(width, base, scaling, kind)


def rotary_width(config: Config, head_width: int) -> int:
    """How many of a gptneox head's numbers are rotated, rounded as llm_convert does."""
    _, section = _section(config)
    place = section if section.get("partial_rotary_factor")[1] is not None else config
    name, share = place.get("rotary_pct", "partial_rotary_factor", default=0.25)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise place.refuse(name, share, "a number above 0, at most 1")
    rotary = int(head_width * share)
    if rotary < 2 or rotary % 2:
        raise place.refuse(name, share, f"one that rotates an even number of a head's {head_width}; found {rotary}")
    return rotary


def _section(config: Config) -> tuple[str, Config]:
    """Of the two, the one that transformers reads."""
    name = "rope_scaling" if config.get("rope_scaling")[1] else "rope_parameters"
    return name, config.section(name)


def _base(config: Config, section: Config, base_name: str) -> float:
    """What the section says counts before `base_name` beside it."""
    within = section.get("rope_theta")[1] is not None
    place, name = (section, "rope_theta") if within else (config, base_name)
    base = place.positive(name, default=BIGDL_BASE)
    if base != BIGDL_BASE:
        place.hinder_bigdl(name, base, f"{BIGDL_BASE}: the runtime fixes it")
    return base


def _kind(section: Config) -> RotaryKind:
    name, found = section.get("rope_type", "type", default="default")
    kind = next((kind for kind in _SCALING if kind == found), None)
    if kind is None:
        raise section.refuse(name, found, f"one of {', '.join(_SCALING)}; {NO_ENGINE}")
    return kind


def _scaling_number(config: Config, section: Config, field: str) -> float:
    if field == "original_max_position_embeddings" and section.get(field)[1] is None:
        return config.positive("max_position_embeddings")
    return section.positive(field)
