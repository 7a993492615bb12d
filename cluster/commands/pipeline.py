"""`nibble pipeline`: BigDL-LLM's native INT4 example as one command, on nibble's own converter and engine.

Convert the checkpoint to INT4, load it with a fixed number of threads, and infer three ways: with the Hugging Face
tokenizer, with the tokenizer inside the library, and 'fast forward', an OpenAI-style completion in one call.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from cluster.artifacts.manifest import Manifest
from cluster.artifacts.node_cache import CachedArtifact
from cluster.config import ArtifactsConfig
from cluster.conversion.local import convert_to_cache
from cluster.conversion.wanted import Wanted
from cluster.display import ConversionDisplay
from cluster.errors import ConfigError
from cluster.families import FamilyName
from cluster.machine.isa import available_cores
from deployments.api.http.openai_objects import CompletionObject, completion_object, usage_object
from deployments.engines.base import TokenRequest
from deployments.engines.bigdl.engine import BigdlEngine
from deployments.generation.generation import generate_text
from deployments.generation.text import Tokenizer
from deployments.records import GenerationRequest, SamplingParams
from deployments.routing.sequences import WholeSequence, joined

MAX_TOKENS = 32  # n_predict of the reference example
CONTEXT = 512  # n_ctx of the reference example

HUGGING_FACE = "HuggingFace transformers tokenizer"
LIBRARY = "bigdl-llm based tokenizer"
FAST_FORWARD = "fast forward"


def pipeline(family: FamilyName, source: str, prompt: str, threads: int, console: Console) -> None:
    """Raises ConfigError for a thread count this machine does not have, CheckpointError or ConversionError."""
    if not 1 <= threads <= available_cores():
        raise ConfigError(f"thread-num: found {threads}, this machine allows 1..{available_cores()}")
    artifact = converted(family, source, console)
    tokenizer = Tokenizer(artifact.folder)
    engine = BigdlEngine(artifact.folder, threads=threads, context=CONTEXT)
    binary = artifact.folder / Manifest.read(artifact.folder).binary
    try:
        show(HUGGING_FACE, lambda: [with_hugging_face_tokenizer(engine, tokenizer, prompt)], console)
        show(LIBRARY, lambda: [with_library_tokenizer(engine, tokenizer, prompt)], console)
        show(FAST_FORWARD, lambda: fast_forward(engine, tokenizer, prompt, binary, console), console)
    finally:
        engine.close()
        artifact.release()


def converted(family: FamilyName, source: str, console: Console) -> CachedArtifact:
    """In this machine's node cache, where the next run finds it."""
    wanted = Wanted(source=source, family=family, quantization="q4_0", engine="bigdl")
    with ConversionDisplay(console) as display:
        return convert_to_cache(wanted, ArtifactsConfig(), display)


def show(heading: str, infer: Callable[[], object], console: Console) -> None:
    """What `infer` returns is printed in Python's own form, as the reference example does with its lists and its
    dictionary."""
    rule = "-" * 20
    console.print(f"{rule} {heading} {rule}")
    started = time.monotonic()
    output = infer()
    seconds = time.monotonic() - started
    for line in (f"Inference time: {seconds:.2f} s", "Output:", str(output)):
        console.print(line)


def with_hugging_face_tokenizer(engine: BigdlEngine, tokenizer: Tokenizer, prompt: str) -> str:
    """The completion's text alone."""
    return tokenizer.decode(generate_ids(engine, tokenizer.encode(prompt), tokenizer.eos_ids))


def with_library_tokenizer(engine: BigdlEngine, tokenizer: Tokenizer, prompt: str) -> str:
    """The completion's text alone."""
    output = engine.detokenize(generate_ids(engine, engine.tokenize(prompt.encode()), tokenizer.eos_ids))
    return output.decode("utf-8", errors="replace")


def fast_forward(
    engine: BigdlEngine, tokenizer: Tokenizer, prompt: str, binary: Path, console: Console
) -> CompletionObject:
    """The completion's object, after the timings, which the libraries of bigdl-llm print by themselves. Its `model` is
    the binary's path, as in the reference."""
    request = GenerationRequest(
        request_id=f"cmpl-{uuid.uuid4()}",
        prompt=prompt,
        max_tokens=MAX_TOKENS,
        stop=(),
        sampling=SamplingParams(temperature=0),
    )

    async def run() -> WholeSequence:
        return joined([chunk async for chunk in generate_text(engine, tokenizer, request)])

    whole = asyncio.run(run())
    for line in ("", *engine.timings.lines()):
        console.print(line)
    usage = usage_object(whole.prompt_tokens, whole.completion_tokens)
    return completion_object(request.request_id, int(time.time()), str(binary), [whole], usage)


def generate_ids(engine: BigdlEngine, prompt: Sequence[int], eos_token_ids: frozenset[int]) -> list[int]:
    """The generated token ids, the end-of-text token left out."""
    request = TokenRequest(prompt, MAX_TOKENS, SamplingParams(temperature=0), eos_token_ids)

    async def run() -> list[int]:
        return [token.id async for tokens in engine.generate(request) for token in tokens]

    return [id for id in asyncio.run(run()) if id not in eos_token_ids]
