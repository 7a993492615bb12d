"""Digests of prompts, and what is known of a replica's cache."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from deployments.records import Conversation, GenerationRequest, Message, Prompt
from deployments.routing.prefix import (
    BLOCK_BYTES,
    BLOCK_IDS,
    MAX_PROMPT_BLOCKS,
    CachedBlocks,
    Prefix,
    prefix_of,
)


def request(prompt: Prompt) -> GenerationRequest:
    return GenerationRequest(request_id="r", prompt=prompt, max_tokens=8)


def blocks_of(prompt: Prompt) -> tuple[int, ...]:
    return prefix_of(request(prompt)).blocks


def conversation(*contents: str) -> Conversation:
    roles = ("system", *("user", "assistant") * len(contents))
    return Conversation(tuple(Message(role, content) for role, content in zip(roles, contents, strict=False)))


# --- digests


@given(st.text(max_size=3 * BLOCK_BYTES), st.text(max_size=3 * BLOCK_BYTES), st.text(max_size=3 * BLOCK_BYTES))
def test_prompts_have_as_many_blocks_in_common_as_whole_blocks_of_bytes(common: str, one: str, other: str) -> None:
    texts = common + one, common + other
    first, second = (each.encode(errors="surrogatepass") for each in texts)
    same = sum(first[:end] == second[:end] for end in range(BLOCK_BYTES, min(len(first), len(second)) + 1, BLOCK_BYTES))
    blocks = [blocks_of(each) for each in texts]
    assert [len(each) for each in blocks] == [len(first) // BLOCK_BYTES, len(second) // BLOCK_BYTES]
    assert blocks[0][:same] == blocks[1][:same]
    assert not set(blocks[0][same:]) & set(blocks[1][same:])


def test_the_next_turn_of_a_conversation_begins_with_the_blocks_of_the_one_before() -> None:
    turns = ["You are kind. " * 20, "What is a CPU? " * 20, "A processor. " * 20, "And RAM? " * 30]
    before, after = blocks_of(conversation(*turns[:2])), blocks_of(conversation(*turns))
    assert len(before) >= 4
    assert after[: len(before)] == before


def test_ids_text_and_messages_are_never_taken_for_each_other() -> None:
    ids = tuple(ord(letter) for letter in "x" * 8 * BLOCK_IDS)
    prompts: list[Prompt] = [ids, "x" * 8 * BLOCK_BYTES, conversation("x" * 8 * BLOCK_BYTES)]
    assert len(blocks_of(ids)) == 8
    found = Counter(block for prompt in prompts for block in blocks_of(prompt))
    assert set(found.values()) == {1}


def test_what_changes_the_beginning_of_a_prompt_changes_all_its_blocks() -> None:
    spoken = conversation("x" * 8 * BLOCK_BYTES)
    told = replace(spoken, template_arguments={"date": "today"})
    assert not set(blocks_of(spoken)) & set(blocks_of(told))
    plain = request("x" * 8 * BLOCK_BYTES)
    assert not set(prefix_of(plain).blocks) & set(prefix_of(replace(plain, add_special_tokens=False)).blocks)


def test_a_prompt_whose_beginning_is_cut_off_has_no_prefix() -> None:
    assert prefix_of(replace(request("x" * 1000), truncate_prompt_tokens=10)).blocks == ()


def test_a_prompt_without_a_whole_block_and_a_very_long_one() -> None:
    assert prefix_of(request("x" * (BLOCK_BYTES - 1))) == Prefix((), BLOCK_BYTES - 1, BLOCK_BYTES)
    assert len(blocks_of("x" * BLOCK_BYTES * (MAX_PROMPT_BLOCKS + 5))) == MAX_PROMPT_BLOCKS
    assert blocks_of("\ud800" * BLOCK_BYTES), "a lone surrogate, which JSON can carry"


# --- a replica's cache


@given(st.lists(st.lists(st.integers(0, 30), max_size=8, unique=True)), st.booleans())
def test_what_is_known_is_bounded_and_the_last_prompt_is_known(prompts: list[list[int]], single: bool) -> None:
    cached = CachedBlocks(10, single)
    for prompt in prompts:
        cached.use(prompt)
        cached.check_integrity()
        assert cached.known(prompt) == len(prompt)
        assert len(cached) <= (len(prompt) if single else 10)


def test_the_least_recently_used_prompt_is_forgotten_and_of_it_the_end_first() -> None:
    cached = CachedBlocks(6, single=False)
    cached.use([1, 2, 3])
    cached.use([4, 5, 6])
    cached.use([1, 2, 3])
    cached.use([7])
    assert (cached.known([1, 2, 3]), cached.known([4, 5, 6]), cached.known([7])) == (3, 2, 1)


def test_what_is_gone_takes_with_it_what_was_used_before_and_nothing_else() -> None:
    cached = CachedBlocks(100, single=False)
    for prompt in ([1, 2], [3, 4], [5, 6]):
        cached.computed(cached.use(prompt))
    cached.dropped(max(cached.last_uses([3, 4])))
    assert [cached.known(prompt) for prompt in ([1, 2], [3, 4], [5, 6])] == [0, 0, 2]
