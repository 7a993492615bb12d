"""Which tokens of a text are logged, and where each begins."""

from __future__ import annotations

import re
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cluster.errors import InvalidRequestError
from deployments.engines.sampling import Sampler
from deployments.generation.generation import embed_text
from deployments.generation.text import Tokenizer
from deployments.records import SamplingParams
from tests.unit.deployments.generation.scripted_engine import (
    BLOOM,
    LLAMA,
    ScriptedEngine,
    collect,
    logged,
    request,
    text_of,
)

PROMPT = "Q: é"


def byte_tokens(tokenizer: Tokenizer) -> dict[bytes, int]:
    """The token of each single byte."""
    return {data: token for token in range(512) if len(data := tokenizer.token_bytes(token)) == 1}


BYTES = {tokenizer: byte_tokens(tokenizer) for tokenizer in (LLAMA, BLOOM)}

# Whole characters, and bytes that begin or continue none.
junk = st.one_of(st.text("a é日🙂", max_size=3).map(str.encode), st.binary(max_size=3))
texts = st.lists(junk, min_size=1, max_size=8).map(b"".join)


def script_of(tokenizer: Tokenizer, data: bytes) -> tuple[int, ...]:
    return tuple(BYTES[tokenizer][bytes([byte])] for byte in data)


@given(st.sampled_from([LLAMA, BLOOM]), texts, st.integers(1, 9), st.booleans())
@example(LLAMA, b"\xed\xa0", 1, False)  # Python's decoder waits for a third byte, although neither goes on
@example(BLOOM, b"a\xed\xa0\x80\xed\xbf", 2, True)
async def test_a_token_begins_at_the_character_that_holds_its_first_byte(
    tokenizer: Tokenizer, data: bytes, batch: int, echo: bool
) -> None:
    script = script_of(tokenizer, data)
    wanted = request(PROMPT, max(1, len(script)), echo=echo, logprobs=0)
    chunks = await collect(ScriptedEngine(script, batch), tokenizer, wanted) if script else []
    entries = logged(chunks)[len(tokenizer.encode(PROMPT)) * echo :]
    start = len(PROMPT) * echo
    # The last character of all bytes up to the first one of the token, decoded at once.
    expected = [start + len(data[: end + 1].decode(errors="replace")) - 1 for end in range(len(data))]
    assert [entry.offset for entry in entries] == expected
    assert [entry.data for entry in entries] == [bytes([byte]) for byte in data]


@given(st.sampled_from([LLAMA, BLOOM]), texts, st.integers(1, 9), st.sampled_from(["a", "\ufffd", "é", "日a", " 🙂"]))
async def test_what_begins_before_a_stop_string_is_logged_and_nothing_else(
    tokenizer: Tokenizer, data: bytes, batch: int, stop: str
) -> None:
    script = script_of(tokenizer, data + b"end")
    chunks = await collect(ScriptedEngine(script, batch), tokenizer, request(PROMPT, len(script), (stop,), logprobs=0))
    text = (data + b"end").decode(errors="replace")
    assert text_of(chunks) == text.partition(stop)[0]
    entries = logged(chunks)
    length = len(text_of(chunks))
    assert all(entry.offset < length for entry in entries)
    everything = logged(await collect(ScriptedEngine(script), tokenizer, request(PROMPT, len(script), logprobs=0)))
    assert entries == [entry for entry in everything if entry.offset < length]


@pytest.mark.parametrize("tokenizer", [LLAMA, BLOOM])
@pytest.mark.parametrize("prompt", ["unit.", " unit.", "  unit."])
async def test_spaces_in_front_of_a_prompt_count(tokenizer: Tokenizer, prompt: str) -> None:
    for wanted in (prompt, tokenizer.encode(prompt)):
        (chunk,) = await collect(ScriptedEngine(()), tokenizer, request(wanted, 0, echo=True, logprobs=0))
        assert chunk.text == (prompt if wanted == prompt else tokenizer.decode(tokenizer.encode(prompt)))
        assert chunk.logprobs[-1].data == b"."
        assert chunk.logprobs[-1].offset == len(chunk.text) - 1


@pytest.mark.parametrize(
    ("tokenizer", "prompt"), [(LLAMA, "<s>"), (LLAMA, "<s><s>a</s>b"), (BLOOM, "</s>"), (BLOOM, "a</s></s>b é</s>c")]
)
async def test_special_tokens_that_a_prompt_spells_count(tokenizer: Tokenizer, prompt: str) -> None:
    """Token ids without the text spell nothing: decoded, a special token has no text."""
    ids = tokenizer.encode(prompt)
    for wanted, text in ((prompt, prompt), (ids, tokenizer.decode(ids))):
        script = script_of(tokenizer, b"xy")
        entries = logged(await collect(ScriptedEngine(script), tokenizer, request(wanted, 2, echo=True, logprobs=0)))
        added = int(tokenizer is LLAMA)  # a BOS, which no text spells
        pieces = re.split("(<s>|</s>)", prompt) if wanted == prompt else [text]
        begins = accumulate((len(piece) for piece in pieces), initial=0)
        starts = {start for start, piece in zip(begins, pieces, strict=False) if piece}
        assert starts <= {entry.offset for entry in entries[added:]}
        assert [entry.offset for entry in entries[-2:]] == [len(text), len(text) + 1]
        assert [entry.offset for entry in entries[:added]] == [0] * added


async def test_a_prompt_may_fill_the_context_where_nothing_is_generated() -> None:
    engine = ScriptedEngine(())
    (chunk,) = await collect(engine, BLOOM, request((5,) * 200, max_tokens=0, echo=True, logprobs=0))
    assert len(chunk.logprobs) == 200
    assert await embed_text(engine, BLOOM, (5,) * 200) == ([200.0], 200)
    for wanted in (request((5,) * 201, max_tokens=0), request((5,) * 200, max_tokens=None)):
        with pytest.raises(InvalidRequestError, match=r"found 20\d tokens"):
            await collect(engine, BLOOM, wanted)
    with pytest.raises(InvalidRequestError, match="allowed are 200"):
        await embed_text(engine, BLOOM, (5,) * 201)


def test_an_end_token_beyond_the_models_vocabulary_is_no_error() -> None:
    sampler = Sampler(SamplingParams(temperature=0, min_tokens=2), [1], eos_ids={1, 600})
    assert sampler.next(np.array([0.0, 5.0, 1.0], np.float32)) == 2
