"""`nibble pipeline`: BigDL-LLM's native INT4 example as one command, on nibble's own converter and engine.

Convert the checkpoint to INT4, load it with a fixed number of threads, and infer three ways: with the Hugging Face
tokenizer, with the tokenizer inside the library, and 'fast forward', an OpenAI-style completion in one call.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Sequence

from rich.console import Console

from cluster.config import ArtifactsConfig
from cluster.display import ConversionDisplay
from cluster.errors import ConfigError
from cluster.families import FamilyName
from cluster.isa import available_cores
from cluster.local_conversion import convert_to_cache
from cluster.wanted import Wanted
from deployments.engines.base import SamplingParams, TokenRequest
from deployments.engines.bigdl import BigdlEngine
from deployments.generation import generate_text
from deployments.openai_objects import completion_object, usage_object
from deployments.records import GenerationRequest
from deployments.router import Completion, joined
from deployments.text import Tokenizer

MAX_TOKENS = 32  # n_predict of the reference example
CONTEXT = 512  # n_ctx of the reference example


def pipeline(family: FamilyName, source: str, prompt: str, threads: int, console: Console) -> None:
    """Raises ConfigError for a thread count this machine does not have, CheckpointError or ConversionError."""
    if not 1 <= threads <= available_cores():
        raise ConfigError(f"thread-num: found {threads}, this machine allows 1..{available_cores()}")
    engine, tokenizer = load(family, source, threads, console)
    try:
        for heading, infer in (
            ("HuggingFace transformers tokenizer", with_hugging_face_tokenizer),
            ("bigdl-llm based tokenizer", with_library_tokenizer),
            ("fast forward", fast_forward),
        ):
            show(heading, lambda infer=infer: infer(engine, tokenizer, prompt, source), console)  # type: ignore[misc]
    finally:
        engine.close()


def load(family: FamilyName, source: str, threads: int, console: Console) -> tuple[BigdlEngine, Tokenizer]:
    """Converts into this machine's node cache, where the next run finds it."""
    wanted = Wanted(source=source, family=family, quantization="q4_0", engine="bigdl")
    with ConversionDisplay(console) as display:
        folder = convert_to_cache(wanted, ArtifactsConfig(), display).folder
    return BigdlEngine(folder, threads=threads, context=CONTEXT), Tokenizer(folder)


def show(heading: str, infer: Callable[[], str], console: Console) -> None:
    started = time.monotonic()
    output = infer()
    seconds = time.monotonic() - started
    lines = ("-" * 20 + f" {heading} " + "-" * 20, f"Inference time: {seconds:.2f} s", "Output:", output)
    for line in lines:
        console.print(line)


def with_hugging_face_tokenizer(engine: BigdlEngine, tokenizer: Tokenizer, prompt: str, source: str) -> str:
    ids = tokenizer.encode(prompt)
    return tokenizer.decode([*ids, *generate_ids(engine, ids, tokenizer.eos_ids)])


def with_library_tokenizer(engine: BigdlEngine, tokenizer: Tokenizer, prompt: str, source: str) -> str:
    ids = engine.tokenize(prompt.encode())
    output = engine.detokenize([*ids, *generate_ids(engine, ids, tokenizer.eos_ids)])
    return output.decode("utf-8", errors="replace")


def fast_forward(engine: BigdlEngine, tokenizer: Tokenizer, prompt: str, source: str) -> str:
    """As the reference has it: the completion's object, printed."""
    request = GenerationRequest(
        request_id=f"cmpl-{uuid.uuid4()}",
        prompt=prompt,
        max_tokens=MAX_TOKENS,
        stop=(),
        sampling=SamplingParams(temperature=0),
    )

    async def run() -> Completion:
        return joined([chunk async for chunk in generate_text(engine, tokenizer, request)])

    whole = asyncio.run(run())
    usage = usage_object(whole.prompt_tokens, whole.completion_tokens)
    answer = completion_object(request.request_id, int(time.time()), source, [whole], usage)
    return json.dumps(answer, ensure_ascii=False)


def generate_ids(engine: BigdlEngine, prompt: Sequence[int], eos_token_ids: frozenset[int]) -> list[int]:
    """The generated token ids, the end-of-text token left out."""
    request = TokenRequest(prompt, MAX_TOKENS, SamplingParams(temperature=0), eos_token_ids)

    async def run() -> list[int]:
        return [token.id async for tokens in engine.generate(request) for token in tokens]

    return [id for id in asyncio.run(run()) if id not in eos_token_ids]
