"""Clients of `nibble bench` for what is no server: an engine in this process, and bigdl-llm as its users run it."""

from __future__ import annotations

import asyncio
import subprocess
import time
from pathlib import Path

from cluster.bench.load_records import Failure, Fields, Prompt, Reply
from deployments.engines.base import Engine, TokenRequest
from deployments.records import SamplingParams


class EngineClient:
    """The engine with no serving layer: token ids in, token ids out."""

    def __init__(self, engine: Engine, output_tokens: int) -> None:
        self._engine, self._output_tokens = engine, output_tokens

    async def complete(self, prompt: Prompt, fields: Fields) -> Reply:
        request = TokenRequest([int(token) for token in prompt], self._output_tokens, SamplingParams(temperature=0))
        chunks, tokens = [], 0
        async for batch in self._engine.generate(request):
            chunks.append(time.perf_counter())
            tokens += len(batch)
        return Reply(tuple(chunks), time.perf_counter(), len(prompt), tokens)

    async def close(self) -> None: ...


# Its Python wrapper as the documentation shows it: a line a request, and when that is done a line a token comes back.
UPSTREAM = """
import json, sys
from importlib import import_module
module, name = {"llama": ("llama", "Llama"), "gptneox": ("gptneox", "Gptneox"), "bloom": ("bloom", "Bloom"),
                "starcoder": ("starcoder", "Starcoder")}[sys.argv[2]]
kind = getattr(import_module("bigdl.llm.ggml.model." + module), name)
model = kind(sys.argv[1], n_ctx=512, n_threads=int(sys.argv[3]))
print("ready", flush=True)
for line in sys.stdin:
    ids, count = json.loads(line)
    for token in model.generate(ids, max_new_tokens=count)[0]:
        print("token", flush=True)
    print("end", flush=True)
"""


class UpstreamClient:
    """bigdl-llm 2.4.0 in a child of an interpreter that has it and torch. One request at a time: its models hold one
    sequence; its tokens come when all are there, so that the first one's time is the last one's."""

    def __init__(self, python: str, binary: Path, family: str, threads: int, output_tokens: int) -> None:
        self._command = [python, "-c", UPSTREAM, str(binary), family, str(threads)]
        self._output_tokens = output_tokens
        self._child: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def complete(self, prompt: Prompt, fields: Fields) -> Reply:
        async with self._turn:
            if self._child is None:
                pipe = subprocess.PIPE
                self._child = await asyncio.create_subprocess_exec(
                    *self._command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
                )
                while await self._line() not in ("ready", ""):
                    pass
            assert self._child.stdin is not None, "it is a pipe"
            self._child.stdin.write(f"[{list(prompt)}, {self._output_tokens}]\n".encode())
            chunks = []
            while (line := await self._line()) != "end":
                if not line:
                    return Reply((), time.perf_counter(), failure=Failure("ended", "bigdl-llm's process died"))
                if line == "token":
                    chunks.append(time.perf_counter())
            return Reply(tuple(chunks), time.perf_counter(), len(prompt), len(chunks))

    async def _line(self) -> str:
        assert self._child is not None, "it was started"
        assert self._child.stdout is not None, "it is a pipe"
        return (await self._child.stdout.readline()).decode().strip()

    async def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            await self._child.wait()
