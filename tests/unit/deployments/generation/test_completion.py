"""A completion that begins in its middle goes on as if it had never stopped."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deployments.engines.base import Token
from deployments.engines.sampling import Sampler
from deployments.generation.completion import CompletionState
from deployments.generation.text import Tokenizer
from deployments.records import (
    Conversation,
    GenerationChunk,
    GenerationRequest,
    Grammar,
    Message,
    Progress,
    SamplingParams,
)
from tests.conftest import DEMOS
from tests.examples import examples
from tests.unit.deployments.generation.scripted_engine import (
    BLOOM,
    LLAMA,
    ScriptedEngine,
    collect,
    logged,
    request,
    text_of,
)
from tests.unit.deployments.generation.test_logprobs import script_of

DEMOS_STARCODER = DEMOS / "starcoder"
LETTERS = "abé日"  # few, so that stop strings often begin


def known(tokenizer: Tokenizer, wanted: GenerationRequest, chunks: list[GenerationChunk]) -> Progress:
    """What a caller knows of a completion, whose chunks these are."""
    prompt = wanted.prompt
    assert isinstance(prompt, str)
    ids = tuple(token for chunk in chunks for token in chunk.token_ids)
    return Progress(tokenizer.encode(prompt), ids, len("".join(chunk.text for chunk in chunks)))


async def assert_resumes_anywhere(
    tokenizer: Tokenizer, wanted: GenerationRequest, script: tuple[int, ...], batch: int, batch_after: int
) -> None:
    """From behind each of its chunks."""
    whole = await collect(ScriptedEngine(script, batch), tokenizer, wanted)
    for count in range(1, len(whole)):
        begun = whole[:count]
        resumed = replace(wanted, progress=known(tokenizer, wanted, begun))
        rest = await collect(ScriptedEngine(script, batch_after), tokenizer, resumed)
        joined = [*begun, *rest]
        assert text_of(joined) == text_of(whole)
        assert logged(joined) == logged(whole)
        assert [id for chunk in joined for id in chunk.token_ids] == [id for chunk in whole for id in chunk.token_ids]
        last = joined[-1]
        assert (last.finish_reason, last.prompt_tokens, last.completion_tokens) == (
            whole[-1].finish_reason,
            whole[-1].prompt_tokens,
            whole[-1].completion_tokens,
        )


# Text that is held back behind a character that was cut off; and behind other text of the same batch.
@example(BLOOM, b"\xe6ax", "Q: é", ("ab",), (1, 1), False, 0, 0, False)
@example(LLAMA, b"xxaxabc", "Q: é", ("abc",), (3, 2), True, 1, 0, True)
@settings(max_examples=examples(100, 500))
@given(
    tokenizer=st.sampled_from([LLAMA, BLOOM]),
    data=st.one_of(st.text(LETTERS, max_size=25).map(str.encode), st.binary(max_size=12)),
    prompt=st.sampled_from(["Q: é", " ", "日"]),
    stop=st.lists(st.text(LETTERS + "\ufffd", min_size=1, max_size=4), max_size=3).map(tuple),
    batches=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    echo=st.booleans(),
    logprobs=st.sampled_from([None, 0, 1]),
    min_tokens=st.integers(0, 5),
    ends=st.booleans(),
)
async def test_text_stops_and_log_go_on_as_if_it_had_never_stopped(
    tokenizer: Tokenizer,
    data: bytes,
    prompt: str,
    stop: tuple[str, ...],
    batches: tuple[int, int],
    echo: bool,
    logprobs: int | None,
    min_tokens: int,
    ends: bool,
) -> None:
    """Also where bytes are no characters, and where text is held back. `ends`: with the model's end token."""
    script = script_of(tokenizer, data) + (tuple(tokenizer.eos_ids)[:1] if ends or not data else ())
    sampling = SamplingParams(min_tokens=min_tokens)
    wanted = request(prompt, len(script), stop, echo=echo, logprobs=logprobs, sampling=sampling)
    await assert_resumes_anywhere(tokenizer, wanted, script, *batches)


async def test_words_of_several_bytes_and_a_chat_template_s_stops() -> None:
    starcoder = Tokenizer(DEMOS_STARCODER)
    script = starcoder.encode(" Yes, it is\nHum, and more.\nHuman: And?")
    conversation = request(Conversation((Message("user", "Is it?"),)), 60)
    whole = await collect(ScriptedEngine(script), starcoder, conversation)
    assert text_of(whole) == " Yes, it is\nHum, and more."
    prompt = starcoder.encode_conversation(Conversation((Message("user", "Is it?"),)))
    for count in range(1, len(whole)):
        begun = whole[:count]
        ids = tuple(token for chunk in begun for token in chunk.token_ids)
        progress = Progress(prompt, ids, sum(len(chunk.text) for chunk in begun))
        rest = await collect(ScriptedEngine(script), starcoder, replace(conversation, progress=progress))
        assert text_of([*begun, *rest]) == text_of(whole)


@given(
    seed=st.integers(0, 2**32 - 1),
    split=st.integers(0, 12),
    temperature=st.sampled_from([0.0, 1.0]),
    repetition=st.sampled_from([1.0, 1.3]),
    presence=st.sampled_from([0.0, 0.5]),
    frequency=st.sampled_from([0.0, 0.5]),
    min_tokens=st.integers(0, 8),
    masked=st.booleans(),
)
def test_a_sampler_goes_on_behind_tokens_that_another_drew(
    seed: int,
    split: int,
    temperature: float,
    repetition: float,
    presence: float,
    frequency: float,
    min_tokens: int,
    masked: bool,
) -> None:
    params = SamplingParams(
        temperature=temperature,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        min_tokens=min_tokens,
        seed=seed,
    )
    rows = np.random.default_rng(seed).normal(size=(12, 512)).astype(np.float32)
    grammar = Grammar("grammar", 'start: ("a" | "b" | "cd")*', "grammar")

    def sampler(generated: list[int]) -> Sampler:
        mask = BLOOM.mask(grammar) if masked else None
        return Sampler(params, (1, 2, 3), BLOOM.eos_ids, mask, generated)

    first = sampler([])
    drawn: list[int] = []
    for row in rows:
        drawn.append(first.next(row))
        if drawn[-1] in BLOOM.eos_ids:
            break
    split = min(split, len(drawn) - 1)
    second = sampler(drawn[:split])
    assert [second.next(row) for row in rows[split : len(drawn)]] == drawn[split:]


@pytest.mark.parametrize("limit", [1, 3])
async def test_what_was_generated_counts_towards_max_tokens(limit: int) -> None:
    script = BLOOM.encode(" one two three four five")
    wanted = request("Q:", 1 + limit, progress=Progress(BLOOM.encode("Q:"), script[:1], len(BLOOM.decode(script[:1]))))
    engine = ScriptedEngine(script)
    chunks = await collect(engine, BLOOM, wanted)
    assert chunks[-1].completion_tokens == 1 + limit
    assert chunks[-1].finish_reason == "length"
    assert engine.requests[0].generated == script[:1]


def test_each_chunk_tells_how_much_of_the_prompt_was_cached() -> None:
    wanted = request("What is")
    state = CompletionState(BLOOM, wanted, BLOOM.encode("What is"), (), BLOOM.eos_ids)
    first, *others = BLOOM.encode(" one two.", False)
    chunks = [state.add([Token(first, reused=2)])]
    chunks += [state.add([Token(token, "length" if token == others[-1] else None)]) for token in others]
    assert {chunk.cached_tokens for chunk in chunks if chunk is not None} == {2}
