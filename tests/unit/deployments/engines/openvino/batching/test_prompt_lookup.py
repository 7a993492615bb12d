from __future__ import annotations

from deployments.engines.openvino.batching.prompt_lookup import SEARCHED, look_up


def test_what_followed_the_same_tokens_last_time_is_guessed() -> None:
    assert look_up([1, 2, 3, 4, 5, 9, 1, 2, 3], 2) == [4, 5]


def test_the_longest_match_counts_and_of_equal_ones_the_latest() -> None:
    assert look_up([1, 2, 3, 7, 5, 3, 8, 1, 2, 3], 1) == [7]
    assert look_up([3, 7, 3, 8, 3], 1) == [8]


def test_a_guess_ends_with_the_text() -> None:
    assert look_up([4, 5, 4], 5) == [5, 4]


def test_nothing_is_guessed_after_a_new_token_or_for_no_room() -> None:
    assert look_up([1, 2, 3], 4) == []
    assert look_up([1], 4) == []
    assert look_up([1, 1], 0) == []


def test_only_the_latest_tokens_are_searched() -> None:
    assert look_up([5, 6, *range(100, 100 + SEARCHED), 5], 2) == []
