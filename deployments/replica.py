"""One Serve replica: one engine with a fixed number of threads, on cores of its own, running one artifact."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import ClassVar

from cluster.artifact_store import fetch_artifact
from cluster.artifacts.node_cache import NodeCache
from cluster.config import ArtifactsConfig, ModelConfig
from cluster.conversion.wanted import Wanted
from cluster.errors import EngineError
from cluster.families import FamilyName
from cluster.isa import available_cores, available_memory, cpu_flags
from deployments.cores import CoreClaim, claim_cores
from deployments.engines.loading import load_engine
from deployments.engines.needs import ADVICE, gib, read_artifact, replica_needs
from deployments.generation.generation import embed_text, generate_text
from deployments.generation.text import Tokenizer
from deployments.records import Conversation, GenerationChunk, GenerationRequest, Prompt


def own_cores(folder: Path, threads: int) -> CoreClaim | None:
    """None where a CPU quota is smaller than the affinity mask: the container then shares its cores with others that
    nibble cannot see, and pinning would crowd them all on the first ones."""
    cores = os.sched_getaffinity(0)
    return claim_cores(folder, threads, cores) if available_cores() == len(cores) else None


def require_memory(model: ModelConfig, folders: Sequence[Path]) -> None:
    """Raises EngineError, with figures, where this node's memory cannot hold a replica with the artifacts in `folders`:
    the kernel would kill it, or another process, in the middle of its work."""
    needs, free = replica_needs(model, [read_artifact(folder) for folder in folders], cpu_flags()), available_memory()
    if needs.total > free:
        raise EngineError(
            f"{model.name}: a replica needs at least {needs} of memory, this node has {gib(free)} GiB free;"
            f" use {ADVICE}"
        )


class Replica:
    """Base of the family deployments (`deployments/families.py`); Serve runs one instance a replica."""

    family: ClassVar[FamilyName]

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, model: ModelConfig, wanted: Sequence[Wanted], artifacts: ArtifactsConfig
    ) -> None:
        """`wanted`: the model's artifacts, as `wanted_artifacts` says."""
        if model.family != self.family:
            raise EngineError(f"{model.name}: family {model.family} cannot run in the {self.family} deployment")
        if model.threads > available_cores():
            raise EngineError(
                f"{model.name}: threads: found {model.threads}, this node allows 1..{available_cores()}"
                " (its cores, or the cgroup's CPU quota)"
            )
        # Kept, not released: the node's cache evicts nothing that a replica has mapped.
        self._artifacts = [await fetch_artifact(each, artifacts) for each in wanted]
        folders = [artifact.folder for artifact in self._artifacts]
        self._tokenizer = Tokenizer(folders[0])
        for draft in folders[1:]:
            self._tokenizer.require_same_tokens(Tokenizer(draft), f"{model.name}: openvino.draft.checkpoint")
        require_memory(model, folders)
        self._claim = own_cores(artifacts.cache_dir / "cores", model.threads)
        self._engine = load_engine(model, folders, self._claim.cores if self._claim else None)
        # Now that the engine has what it derives beside its artifact.
        await asyncio.to_thread(NodeCache(artifacts.cache_dir, artifacts.cache_size).evict)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        async for chunk in generate_text(self._engine, self._tokenizer, request):
            yield chunk

    async def tokenize(self, text: str | Conversation, add_special_tokens: bool) -> tuple[int, ...]:
        if isinstance(text, Conversation):
            return self._tokenizer.encode_conversation(text)
        return self._tokenizer.encode(text, add_special_tokens)

    async def detokenize(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, self._engine.vocab_size)

    async def embed(self, prompt: Prompt, max_tokens: int | None) -> tuple[list[float], int]:
        return await embed_text(self._engine, self._tokenizer, prompt, max_tokens)

    async def info(self) -> dict[str, str | int | float]:
        cores = ",".join(map(str, self._claim.cores)) if self._claim else "any"
        return {**self._engine.info(), "pid": os.getpid(), "cores": cores}
