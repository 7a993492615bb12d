from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.errors import CheckpointError
from cluster.families.config_fields import Config


def config(**values: Any) -> Config:
    return Config(Path("model/config.json"), values)


def test_the_first_name_that_is_present_counts_and_null_is_absent() -> None:
    fields = config(a=None, b=2, c=3)
    assert fields.integer("a", "b", "c") == 2
    assert fields.get("a", "x", default=7) == ("a", 7)
    assert fields.integer("a", default=7) == 7
    assert [fields.is_null(name) for name in "abx"] == [True, False, False]


@pytest.mark.parametrize("value", [0, -1, 2**31, True, 1.0, "1"])
def test_an_integer_is_one_within_its_range(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"^model/config\.json: n: found .*, allowed is an integer from 1 to"):
        config(n=value).integer("n")
    assert config(n=2**31 - 1).integer("n") == 2**31 - 1


def test_an_integer_without_a_default_is_required() -> None:
    with pytest.raises(CheckpointError, match="n: found None"):
        config().integer("n", "m")
    assert config(n=0).integer("n", least=0) == 0


@pytest.mark.parametrize("value", [0, -0.5, float("inf"), float("nan"), True, "1", 10**400])
def test_a_positive_number_is_finite(value: Any) -> None:
    with pytest.raises(CheckpointError, match="a number above 0"):
        config(x=value).positive("x")
    assert config(x=1).positive("x") == 1.0


def test_a_flag_is_true_or_false_and_no_number() -> None:
    assert config(x=True).flag("x", False)
    assert config().flag("x", True)
    with pytest.raises(CheckpointError, match="x: found 1, allowed is true or false"):
        config(x=1).flag("x", False)


def test_what_no_engine_runs_is_refused_with_the_reason() -> None:
    config(x="a").require("x", "a", default="b", why="because")
    config().require("x", "b", default="b", why="because")
    with pytest.raises(CheckpointError, match="x: found 'c', allowed is 'a': because; no engine of this version runs"):
        config(x="c").require("x", "a", default="a", why="because")
    assert config(x="b").choice("x", choices=("a", "b"), default="a") == "b"
    with pytest.raises(CheckpointError, match="allowed is one of a, b; no engine"):
        config(x="c").choice("x", choices=("a", "b"), default="a")


def test_what_hinders_an_engine_is_noted_once_wherever_it_stands() -> None:
    whole = config(rope={"factor": 3})
    section = whole.section("rope")
    assert whole.obstacles == ()
    section.hinder_bigdl("factor", section.integer("factor"), "1")
    whole.hinder_bigdl("other", 1, "2")
    ((engine, why),) = whole.obstacles
    assert engine == "bigdl"
    assert why == "model/config.json: rope.factor: found 3, allowed is 1; engine openvino runs it"


def test_a_section_that_is_not_there_is_empty_and_one_that_is_no_object_is_refused() -> None:
    assert config().section("rope").integer("factor", default=5) == 5
    with pytest.raises(CheckpointError, match="rope: found 3, allowed is an object"):
        config(rope=3).section("rope")
    with pytest.raises(CheckpointError, match=r"rope\.inner: found \[\], allowed is an object"):
        config(rope={"inner": []}).section("rope").section("inner")
