from __future__ import annotations

import pytest

from cluster.cli.option_prefixes import AmbiguousOptionError, expanded

OPTIONS = {"--thread-num": True, "--tmp-path": True, "--prompt": True, "--prompt-file": True, "--quiet": False}


def names(*args: str) -> list[str]:
    return list(expanded(args, OPTIONS))


def test_a_prefix_that_one_option_has_is_that_option() -> None:
    assert names("--thr", "2", "--tmp=/x=y", "--q") == ["--thread-num", "2", "--tmp-path=/x=y", "--quiet"]


def test_a_whole_name_is_itself_though_another_one_begins_with_it() -> None:
    assert names("--prompt", "a", "--prompt=b") == ["--prompt", "a", "--prompt=b"]


@pytest.mark.parametrize(("written", "candidates"), [("--t", "--thread-num or --tmp-path"), ("--pro=a", "--prompt or")])
def test_a_prefix_of_several_is_refused_with_their_names(written: str, candidates: str) -> None:
    with pytest.raises(AmbiguousOptionError, match=f"could be {candidates}"):
        names(written)


def test_values_stay_as_they_are() -> None:
    assert names("--prompt", "--t", "--q", "--q") == ["--prompt", "--t", "--quiet", "--quiet"]
    assert names("--quiet", "a", "-q", "--", "--t") == ["--quiet", "a", "-q", "--", "--t"]
    assert names("--prompt") == ["--prompt"]  # its value is missing, which is for Click to say


def test_what_no_option_begins_with_is_left_to_click() -> None:
    assert names("--temperature", "1") == ["--temperature", "1"]
