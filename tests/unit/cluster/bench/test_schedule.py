"""What is sent and when: counts, arrivals, turns, prompts."""

from __future__ import annotations

import statistics
from itertools import islice
from pathlib import Path

import pytest

from cluster.bench.load_records import Load
from cluster.bench.prompts import FIRST_ID, file_prompts, token_prompts, word_prompts
from cluster.bench.schedule import arrivals, request_count, turns
from cluster.errors import ConfigError
from tests.unit.bench_records import settings_for


@pytest.mark.parametrize(
    ("load", "requests", "duration", "count"),
    [
        (Load("concurrency", 1), None, None, 8),
        (Load("concurrency", 16), None, None, 64),
        (Load("rate", 0.5), None, None, 8),
        (Load("rate", 2.51), None, None, 26),
        (Load("rate", 2), 5, None, 5),
        (Load("rate", 2), None, 3.0, None),
        (Load("concurrency", 16), 5, 3.0, 5),
    ],
)
def test_how_many_requests_a_run_has(load: Load, requests: int | None, duration: float | None, count: int) -> None:
    assert request_count(load, requests, duration) == count


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    times = arrivals(5.0, 4000, None, "a")
    gaps = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    assert len(times) == 4000
    assert times == sorted(times)
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.05)


def test_arrivals_are_the_same_for_the_same_seed() -> None:
    assert arrivals(5.0, 10, None, "a") == arrivals(5.0, 10, None, "a")
    assert arrivals(5.0, 10, None, "a") != arrivals(5.0, 10, None, "b")


def test_arrivals_end_at_the_duration_or_the_count() -> None:
    assert arrivals(5.0, None, 2.0, "a") == [due for due in arrivals(5.0, 100, None, "a") if due < 2.0]
    assert len(arrivals(5.0, 3, 100.0, "a")) == 3


def test_servers_take_turns_and_every_other_round_is_reversed() -> None:
    loads = (Load("concurrency", 1), Load("rate", 2))
    assert turns(settings_for("http://a", "http://b", loads=loads, rounds=2)) == [
        (loads[0], 0, 0), (loads[0], 0, 1), (loads[0], 1, 1), (loads[0], 1, 0),
        (loads[1], 0, 0), (loads[1], 0, 1), (loads[1], 1, 1), (loads[1], 1, 0),
    ]  # fmt: skip


def test_token_prompts_have_the_length_and_the_range_and_are_unique() -> None:
    prompts = list(islice(token_prompts(1, 3, 10), 300))
    assert len(set(prompts)) == 300
    assert {len(prompt) for prompt in prompts} == {3}
    assert {id for prompt in prompts for id in prompt} == set(range(FIRST_ID, 10))
    assert prompts == list(islice(token_prompts(1, 3, 10), 300))
    assert prompts != list(islice(token_prompts(2, 3, 10), 300))


def test_where_unique_prompts_end_it_is_said() -> None:
    prompts = token_prompts(1, 1, 6)
    assert sorted(islice(prompts, 3)) == [(3,), (4,), (5,)]
    with pytest.raises(ConfigError, match="input-tokens: after 3 prompts no more"):
        next(prompts)


def test_word_prompts_have_as_many_words() -> None:
    prompts = list(islice(word_prompts(1, 6), 50))
    assert len(set(prompts)) == 50
    assert {len(str(prompt).split()) for prompt in prompts} == {6}


def test_a_file_s_lines_are_used_up_before_they_come_again_with_a_number(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\n\n  \nthree\none\n")
    prompts = list(islice(file_prompts(1, file), 7))
    assert sorted(map(str, prompts[:3])) == ["one", "three", "two"]
    assert prompts[3:6] == [f"(2) {prompt}" for prompt in prompts[:3]]
    assert prompts[6] == f"(3) {prompts[0]}"


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    with pytest.raises(ConfigError, match=r"prompt-file: .* cannot be read"):
        file_prompts(1, file)
    file.write_text("\n \n")
    with pytest.raises(ConfigError, match="has no text; expected one prompt a line"):
        file_prompts(1, file)
