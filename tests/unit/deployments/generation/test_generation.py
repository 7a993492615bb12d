from __future__ import annotations

import threading
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InvalidRequestError
from deployments.engines.base import Token, TokenRequest
from deployments.generation.generation import LONG_TEXT, embed_text, generate_text, off_the_loop
from deployments.generation.text import Tokenizer
from deployments.records import (
    Conversation,
    EngineTimes,
    GenerationChunk,
    GenerationRequest,
    Grammar,
    Message,
    SamplingParams,
)
from tests.conftest import DEMOS
from tests.unit.deployments.generation.scripted_engine import (
    BLOOM,
    LLAMA,
    ScriptedEngine,
    collect,
    logged,
    request,
    text_of,
)


@pytest.mark.parametrize("batch", [1, 3, 100])
async def test_text_arrives_in_order_and_ends_with_reason_and_counts(batch: int) -> None:
    script = BLOOM.encode(" A CPU is the processor.")
    chunks = await collect(ScriptedEngine(script, batch), BLOOM, request(max_tokens=len(script)))
    assert text_of(chunks) == " A CPU is the processor."
    assert chunks[-1].finish_reason == "length"
    assert chunks[-1].prompt_tokens == len(BLOOM.encode("Q:"))
    assert chunks[-1].completion_tokens == len(script)


async def test_the_end_token_has_no_text_but_counts() -> None:
    (eos,) = BLOOM.eos_ids
    script = (*BLOOM.encode(" Yes."), eos, *BLOOM.encode(" No."))
    chunks = await collect(ScriptedEngine(script), BLOOM, request())
    assert text_of(chunks) == " Yes."
    assert chunks[-1].finish_reason == "stop"
    assert chunks[-1].token_ids[-1] == eos


@pytest.mark.parametrize("ignore_eos", [False, True])
async def test_a_stop_token_ends_the_text_as_an_end_token_does(ignore_eos: bool) -> None:
    (dot,) = BLOOM.encode(".")
    script = (*BLOOM.encode(" Yes"), dot, *BLOOM.encode(" No."))
    engine = ScriptedEngine(script)
    chunks = await collect(engine, BLOOM, request(stop_token_ids=(dot, 3), ignore_eos=ignore_eos))
    assert (text_of(chunks), chunks[-1].finish_reason, chunks[-1].token_ids[-1]) == (" Yes", "stop", dot)
    # The engine holds them back as long as `min_tokens` says.
    assert engine.requests[0].eos_token_ids == {dot, 3} | (set() if ignore_eos else BLOOM.eos_ids)


async def test_many_stop_strings_cut_at_the_one_that_is_complete_first() -> None:
    stops = (*(f"{number}:" for number in range(127)), "pro")
    chunks = await collect(ScriptedEngine(BLOOM.encode(" A CPU is the processor.")), BLOOM, request(stop=stops))
    assert (text_of(chunks), chunks[-1].finish_reason) == (" A CPU is the ", "stop")


async def test_special_tokens_are_text_where_they_are_not_skipped() -> None:
    """An end token is none of the text all the same, and a stop string that is a special token cuts as any other."""
    (eos,) = BLOOM.eos_ids
    script = (*BLOOM.encode(" Yes"), 3, *BLOOM.encode("."), eos)
    for skip, text in ((True, " Yes."), (False, " Yes<pad>.")):
        wanted = request(skip_special_tokens=skip, logprobs=0)
        chunks = await collect(ScriptedEngine(script), BLOOM, wanted)
        assert text_of(chunks) == text
        assert [token.offset for token in logged(chunks)][-1] == len(text) - 1
        stopped = await collect(ScriptedEngine(script), BLOOM, request(skip_special_tokens=skip, stop=("<pad>",)))
        assert (text_of(stopped), stopped[-1].finish_reason) == (" Yes", "stop")
    echoed = await collect(ScriptedEngine(script), BLOOM, request((3, 5), echo=True, skip_special_tokens=False))
    assert text_of(echoed).startswith("<pad>")


async def test_special_tokens_are_added_to_a_text_unless_told_otherwise() -> None:
    for added in (True, False):
        engine = ScriptedEngine(LLAMA.encode("x"))
        await collect(engine, LLAMA, request("What", max_tokens=1, add_special_tokens=added))
        assert engine.requests[0].prompt == LLAMA.encode("What", added)
    assert LLAMA.encode("What") != LLAMA.encode("What", False)


@pytest.mark.parametrize(("last", "kept"), [(None, 9), (3, 3), (20, 9), (-1, 9)])
async def test_a_prompt_is_cut_to_its_last_tokens(last: int | None, kept: int) -> None:
    engine, ids = ScriptedEngine(BLOOM.encode("x")), tuple(range(10, 19))
    (first, *_) = await collect(engine, BLOOM, request(ids, truncate_prompt_tokens=last, return_token_ids=True))
    assert engine.requests[0].prompt == ids[-kept:] == first.prompt_token_ids


async def test_a_prompt_that_does_not_fit_is_cut_to_what_fits() -> None:
    engine, text = ScriptedEngine(BLOOM.encode("x"), context=20), "one two three " * 30
    wanted = request(text, max_tokens=1, truncate_prompt_tokens=-1, echo=True)
    chunks = await collect(engine, BLOOM, wanted)
    assert engine.requests[0].prompt == BLOOM.encode(text)[-19:]
    assert text_of(chunks) == BLOOM.decode(BLOOM.encode(text)[-19:]) + "x"
    limited = request(text, max_tokens=1, truncate_prompt_tokens=-1, max_prompt_tokens=5)
    await collect(engine, BLOOM, limited)
    assert engine.requests[1].prompt == BLOOM.encode(text)[-5:]


@pytest.mark.parametrize("batch", [1, 4, 100])
async def test_a_stop_string_cuts_the_text_and_closes_the_engine_before_the_last_chunk(batch: int) -> None:
    engine = ScriptedEngine(BLOOM.encode(" Yes.\nQ: And then?"), batch)
    chunks: list[GenerationChunk] = []
    async for chunk in generate_text(engine, BLOOM, request(stop=("zzz", ".\nQ"))):
        chunks.append(chunk)
        assert engine.closed == (chunk.finish_reason is not None)
    assert text_of(chunks) == " Yes"
    assert chunks[-1].finish_reason == "stop"
    if batch == 1:
        assert engine.given == chunks[-1].completion_tokens < len(engine.script)


async def test_text_that_only_looked_like_a_stop_string_is_given_in_the_end() -> None:
    script = BLOOM.encode(" a\n\nQ")
    chunks = await collect(ScriptedEngine(script), BLOOM, request(max_tokens=len(script), stop=("\n\nQ:",)))
    assert text_of(chunks) == " a\n\nQ"
    assert chunks[-1].finish_reason == "length"


async def test_characters_are_never_split() -> None:
    script = LLAMA.encode("日本 🙂")
    chunks = await collect(ScriptedEngine(script[1:]), LLAMA, request(max_tokens=len(script) - 1))
    assert text_of(chunks) == " 日本 🙂"
    assert not any("\ufffd" in chunk.text for chunk in chunks)


async def test_a_character_cut_off_by_max_tokens_becomes_a_replacement_character() -> None:
    script = BLOOM.encode("日")
    chunks = await collect(ScriptedEngine(script), BLOOM, request(max_tokens=len(script) - 1))
    assert text_of(chunks) == "\ufffd"


async def test_closing_the_stream_closes_the_engines() -> None:
    engine = ScriptedEngine(BLOOM.encode("one two three four five"))
    stream = generate_text(engine, BLOOM, request())
    await anext(stream)
    await stream.aclose()
    assert engine.closed


async def test_token_ids_are_taken_as_they_are() -> None:
    engine = ScriptedEngine(BLOOM.encode("x"))
    await collect(engine, BLOOM, request(prompt=(5, 6), max_tokens=1))
    assert tuple(engine.requests[0].prompt) == (5, 6)
    assert engine.requests[0].eos_token_ids == BLOOM.eos_ids


async def test_an_empty_prompt_needs_a_tokenizer_that_begins_texts() -> None:
    engine = ScriptedEngine(LLAMA.encode("unit")[1:])
    chunks = await collect(engine, LLAMA, request("", max_tokens=len(engine.script)))
    assert text_of(chunks) == "unit"
    assert tuple(engine.requests[0].prompt) == (1,)
    with pytest.raises(InvalidRequestError, match="no tokens"):
        await collect(ScriptedEngine(()), BLOOM, request(""))


@pytest.mark.parametrize(
    ("wanted", "field", "says"),
    [
        (request(prompt=tuple([5] * 200)), "prompt", "found 200 tokens, allowed are 199"),
        (request(prompt=(5, 512)), "prompt", "512"),
        (request(prompt=(-1,)), "prompt", "-1"),
        (request(prompt=()), "prompt", "no tokens"),
        (request(max_tokens=-1), "max_tokens", "-1"),
        (request(prompt=(5,) * 9, max_prompt_tokens=8), "prompt", "found 9 tokens, this server allows 8"),
        (request(sampling=SamplingParams(logit_bias=((512, 1.0),))), "logit_bias", "found token id 512"),
        (request(prompt=Conversation((Message("user", "x" * 999),))), "messages", "found"),
        (request(grammar=Grammar("grammar", "start: ]", "grammar")), "grammar", "grammar"),
        (request(stop=("",)), "stop", "empty"),
        (request(stop_token_ids=(512,)), "stop_token_ids", "found token id 512, allowed are 0 to 511"),
        (request(prompt="\ud800"), "prompt", "surrogate"),
    ],
)
async def test_bad_requests_are_refused_before_the_engine_sees_them(
    wanted: GenerationRequest, field: str, says: str
) -> None:
    engine = ScriptedEngine((1,))
    with pytest.raises(InvalidRequestError, match=says) as caught:
        await collect(engine, BLOOM, wanted)
    assert caught.value.field == field
    assert not engine.requests


async def test_a_prompt_and_max_tokens_beyond_the_context_end_with_length() -> None:
    engine = ScriptedEngine(BLOOM.encode("word " * 100))
    chunks = await collect(engine, BLOOM, request(prompt=tuple([5] * 190), max_tokens=500))
    assert chunks[-1].completion_tokens == 10
    assert chunks[-1].finish_reason == "length"


async def test_no_bound_of_its_own_means_the_rest_of_the_context() -> None:
    engine = ScriptedEngine(BLOOM.encode("word " * 300))
    chunks = await collect(engine, BLOOM, request(prompt=(5,) * 20, max_tokens=None))
    assert chunks[-1].completion_tokens == 180


async def test_no_tokens_wanted_generates_nothing() -> None:
    engine = ScriptedEngine((1,))
    (chunk,) = await collect(engine, BLOOM, request("What is", max_tokens=0, echo=True, logprobs=1))
    assert (chunk.text, chunk.finish_reason, chunk.completion_tokens, chunk.token_ids) == ("What is", "length", 0, ())
    assert [token.logprob for token in chunk.logprobs] == [None] + [-0.5] * (chunk.prompt_tokens - 1)
    assert not engine.requests


async def test_ignore_eos_goes_on() -> None:
    (eos,) = BLOOM.eos_ids
    script = (*BLOOM.encode(" Yes."), eos, *BLOOM.encode(" No."))
    chunks = await collect(ScriptedEngine(script), BLOOM, request(max_tokens=len(script), ignore_eos=True))
    assert text_of(chunks) == " Yes. No."
    assert chunks[-1].finish_reason == "length"


@pytest.mark.parametrize(("min_tokens", "text"), [(0, "a"), (2, "a"), (3, "ab;a"), (6, "ab;ab;a"), (99, "ab;ab;ab;")])
async def test_a_stop_string_counts_once_it_ends_after_min_tokens(min_tokens: int, text: str) -> None:
    script = tuple(BLOOM.encode(letter)[0] for letter in "ab;ab;ab;")
    wanted = request(max_tokens=9, stop=("b;",), sampling=SamplingParams(min_tokens=min_tokens))
    assert text_of(await collect(ScriptedEngine(script), BLOOM, wanted)) == text


@pytest.mark.parametrize("tokenizer", [LLAMA, BLOOM])
async def test_offsets_are_where_a_token_s_text_begins(tokenizer: Tokenizer) -> None:
    prompt, completion = "Q: 日本?", " 東京 is it 🙂."
    whole = tokenizer.encode(prompt + completion)
    script = whole[len(tokenizer.encode(prompt)) :]
    wanted = request(prompt, len(script), echo=True, logprobs=0)
    chunks = await collect(ScriptedEngine(script), tokenizer, wanted)
    text = text_of(chunks)
    assert text == prompt + completion
    entries = logged(chunks)
    assert len(entries) == len(whole)
    for entry in entries:
        # Of a character that is spread over tokens, each token begins where the character does.
        piece = entry.data.decode(errors="ignore")
        begun = piece if entry.offset or not tokenizer.strips_first_space else piece.removeprefix(" ")
        assert text[entry.offset :].startswith(begun)
    ends = [entry.offset for entry in entries[1:]] + [len(text)]
    assert all(start.offset <= end for start, end in zip(entries, ends, strict=True))
    assert b"".join(entry.data for entry in entries).decode().lstrip() == text


async def test_what_lies_beyond_a_stop_string_is_not_logged() -> None:
    script = tuple(BLOOM.encode(letter)[0] for letter in "abc;de")
    chunks = await collect(ScriptedEngine(script), BLOOM, request(stop=("c;",), logprobs=0))
    assert text_of(chunks) == "ab"
    assert [entry.data for entry in logged(chunks)] == [b"a", b"b"]


@given(
    tokenizer=st.sampled_from([LLAMA, BLOOM]),
    text=st.text(alphabet="ab;\n é日🙂", max_size=30),
    cut=st.integers(0, 5),
    stop=st.lists(st.text(alphabet="ab;\n é日🙂", min_size=1, max_size=3), max_size=3).map(tuple),
    batch=st.integers(1, 7),
    echo=st.booleans(),
    logprobs=st.sampled_from([None, 0, 1]),
    min_tokens=st.integers(0, 4),
)
async def test_streamed_in_any_pieces_it_is_the_same_completion(
    tokenizer: Tokenizer,
    text: str,
    cut: int,
    stop: tuple[str, ...],
    batch: int,
    echo: bool,
    logprobs: int | None,
    min_tokens: int,
) -> None:
    """`cut`: tokens left out at the end, so that characters end in the middle."""
    script = tokenizer.encode("x" + text)[1:]
    script = script[: max(1, len(script) - cut)] or (5,)
    fields = {"echo": echo, "logprobs": logprobs, "sampling": SamplingParams(min_tokens=min_tokens)}
    wanted = request("Q: é", len(script), stop, **fields)
    pieces = await collect(ScriptedEngine(script, batch), tokenizer, wanted)
    whole = await collect(ScriptedEngine(script, len(script)), tokenizer, wanted)
    assert text_of(pieces) == text_of(whole)
    assert logged(pieces) == logged(whole)
    assert [id for chunk in pieces for id in chunk.token_ids] == list(script)[: pieces[-1].completion_tokens]
    assert pieces[-1].finish_reason == whole[-1].finish_reason
    if not min_tokens:
        completion = text_of(pieces)[len("Q: é") * echo :]
        assert not any(each in completion for each in stop)


async def test_a_conversation_goes_through_the_template_and_its_stops() -> None:
    starcoder = Tokenizer(DEMOS / "starcoder")  # has no template of its own
    engine = ScriptedEngine(starcoder.encode(" Yes.\nHuman: And?"))
    chunks = await collect(engine, starcoder, request(Conversation((Message("user", "Is it?"),))))
    assert text_of(chunks) == " Yes."
    assert "Is it?" in starcoder.decode(engine.requests[0].prompt)


async def test_a_grammar_reaches_the_engine_as_a_mask() -> None:
    engine = ScriptedEngine(BLOOM.encode("{}"))
    grammar = Grammar("json_schema", '{"type":"object"}', "response_format")
    await collect(engine, BLOOM, request(max_tokens=1, grammar=grammar))
    assert engine.requests[0].mask is not None


async def test_embeddings_name_their_own_field() -> None:
    assert await embed_text(ScriptedEngine(()), BLOOM, (5, 6, 7)) == ([3.0], 3)
    with pytest.raises(InvalidRequestError) as caught:
        await embed_text(ScriptedEngine(()), BLOOM, (512,))
    assert caught.value.field == "input"


@pytest.mark.parametrize("long", [False, True])
async def test_a_long_text_is_not_tokenized_on_the_event_loop(long: bool) -> None:
    text = "x" * (LONG_TEXT + 1 if long else 10)
    for prompt in (text, Conversation((Message("user", text),))):
        thread = await off_the_loop(prompt, threading.get_ident)
        assert (thread != threading.get_ident()) == long


async def test_the_first_chunk_behind_a_token_tells_what_the_engine_took() -> None:
    class TimedEngine(ScriptedEngine):
        async def generate(self, request: TokenRequest) -> AsyncGenerator[list[Token], None]:
            first = True
            async for batch in super().generate(request):
                yield [replace(batch[0], queued_s=2.0, prefill_s=3.0), *batch[1:]] if first else batch
                first = False

    engine = TimedEngine(BLOOM.encode(" A CPU is"))
    echoed, first, *others = await collect(engine, BLOOM, request("Q:", 3, echo=True))
    assert (echoed.text, echoed.engine_times, first.engine_times) == ("Q:", None, EngineTimes(2.0, 3.0))
    assert {chunk.engine_times for chunk in others} == {None}
