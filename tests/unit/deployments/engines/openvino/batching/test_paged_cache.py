from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import EngineError
from deployments.engines.openvino.batching.paged_cache import BLOCK_TOKENS, BlockPool

B = BLOCK_TOKENS


def computed(pool: BlockPool, tokens: list[int]) -> list[int]:
    """A sequence whose tokens all went through the cache."""
    table: list[int] = []
    pool.reuse(tokens, table)
    assert pool.grow(table, len(tokens))
    pool.name_full(table, tokens, len(tokens))
    return table


def test_a_table_grows_by_whole_blocks_or_not_at_all() -> None:
    pool, table = BlockPool(3), []
    assert pool.grow(table, 1)
    assert pool.grow(table, B)
    assert len(table) == 1
    assert pool.grow(table, B + 1)
    assert not pool.grow(table, 3 * B + 1)
    assert (len(table), pool.free) == (2, 1)


def test_a_prompt_takes_the_full_blocks_of_one_that_began_alike() -> None:
    pool, tokens = BlockPool(8), list(range(3 * B))
    first = computed(pool, tokens)
    table: list[int] = []
    assert pool.reuse([*tokens[: 2 * B], 7, 8, 9], table) == 2 * B
    assert table == first[:2]
    pool.check_integrity([first, table])


def test_at_least_the_last_token_is_left_to_compute() -> None:
    pool, tokens = BlockPool(8), list(range(2 * B))
    computed(pool, tokens)
    assert pool.reuse(tokens, []) == B


def test_a_block_in_the_middle_is_not_shared_where_what_came_before_it_differs() -> None:
    pool, tokens = BlockPool(8), list(range(2 * B))
    computed(pool, tokens)
    assert pool.reuse([99, *tokens[1:], 5], []) == 0


def test_released_blocks_keep_their_content_until_they_are_needed() -> None:
    pool, tokens = BlockPool(3), list(range(2 * B))
    table = computed(pool, tokens)
    pool.release(table)
    assert (table, pool.free) == ([], 3)
    again: list[int] = []
    assert pool.reuse([*tokens, 1], again) == 2 * B
    pool.release(again)
    other = computed(pool, [5] * (3 * B))  # takes every block
    assert pool.reuse([*tokens, 1], []) == 0
    pool.check_integrity([other])


def test_blocks_without_content_are_taken_before_those_that_can_be_shared() -> None:
    pool, tokens = BlockPool(2), list(range(B))
    table = computed(pool, [*tokens, 3])  # one full block, one that is not
    pool.release(table)
    assert pool.grow(table, 1)
    assert pool.reuse([*tokens, 4], []) == B


def test_nothing_is_shared_after_forgetting() -> None:
    pool, tokens = BlockPool(4), list(range(2 * B))
    table = computed(pool, tokens)
    pool.forget()
    assert pool.reuse([*tokens, 1], []) == 0
    pool.release(table)
    pool.check_integrity([])


def test_two_that_compute_the_same_at_once_leave_sound_books() -> None:
    pool, tokens = BlockPool(4), list(range(B))
    one, two = [], []
    for table in (one, two):
        assert pool.grow(table, B)
    for table in (one, two):
        pool.name_full(table, tokens, B)
    pool.check_integrity([one, two])
    shared: list[int] = []
    assert pool.reuse([*tokens, 1], shared) == B
    assert shared == one
    for table in (one, two, shared):
        pool.release(table)
    pool.check_integrity([])


def test_a_table_that_is_not_counted_is_found() -> None:
    pool, table = BlockPool(2), []
    pool.grow(table, 1)
    with pytest.raises(EngineError, match=r"blocks \[0\] are counted wrongly"):
        pool.check_integrity([])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 1), min_size=1, max_size=4)), max_size=30))
def test_any_order_of_coming_and_going_leaves_sound_books(events: list[tuple[int, list[int]]]) -> None:
    pool = BlockPool(6)
    tables: dict[int, list[int]] = {}
    for slot, pattern in events:
        if slot in tables:
            pool.release(tables.pop(slot))
            continue
        tokens = [bit for bit in pattern for _ in range(B)] + [7]
        table: list[int] = []
        pool.reuse(tokens, table)
        if pool.grow(table, len(tokens)):
            pool.name_full(table, tokens, len(tokens))
            tables[slot] = table
        else:
            pool.release(table)
        pool.check_integrity(list(tables.values()))
