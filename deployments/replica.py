"""One Serve replica: one engine with a fixed number of threads, on cores of its own, running one artifact."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ray import serve

from cluster.artifact_store import fetch_artifact
from cluster.artifacts.node_cache import NodeCache
from cluster.config import ArtifactsConfig
from cluster.conversion.wanted import Wanted
from cluster.errors import EngineError
from cluster.families import FamilyName
from cluster.machine.isa import available_cores, available_memory, cpu_flags, isa_name
from cluster.machine.topology import topology
from cluster.model_config import ModelConfig
from cluster.serve_settings import SERVE_LOGGER
from deployments.cores import CoreClaim, claim_cores
from deployments.engines.loading import load_engine
from deployments.engines.needs import ADVICE, gib, read_artifact, replica_needs
from deployments.generation.generation import embed_text, generate_text, off_the_loop
from deployments.generation.text import Tokenizer
from deployments.observability.tracing import traced
from deployments.records import Conversation, GenerationChunk, GenerationRequest, Prompt

logger = logging.getLogger(SERVE_LOGGER)


def own_cores(folder: Path, model: ModelConfig) -> CoreClaim | None:
    """None where a CPU quota is smaller than the affinity mask: the container then shares its cores with others that
    nibble cannot see, and pinning would crowd them all on the first ones. The log has what could not be had."""
    cpus = topology(os.sched_getaffinity(0))
    if available_cores() < len(cpus):
        logger.warning("%s: its threads have no cores of their own, because of the container's CPU quota", model.name)
        return None
    claim = claim_cores(folder, model.threads, cpus)
    if claim.unmet:
        logger.warning("%s: threads: %d on CPUs %s: %s", model.name, model.threads, claim.cores, "; ".join(claim.unmet))
    return claim


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
    """Base of the family deployments (`deployments/family_deployments.py`); Serve runs one instance a replica."""

    family: ClassVar[FamilyName]

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, model: ModelConfig, wanted: Sequence[Wanted], artifacts: ArtifactsConfig
    ) -> None:
        """`wanted`: the model's artifacts, as `wanted_artifacts` says."""
        self._stall_s: float | None = None
        self._span_attributes = {"service.instance.id": serve.get_replica_context().replica_id.unique_id}
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
        self._tokenizer = Tokenizer(folders[0], model.tool_parser)
        for draft in folders[1:]:
            self._tokenizer.require_same_tokens(Tokenizer(draft), f"{model.name}: openvino.draft.checkpoint")
        require_memory(model, folders)
        self._claim = own_cores(artifacts.cache_dir / "cores", model)
        self._engine = load_engine(model, folders, self._claim.cores if self._claim else None)
        # Now that the engine has what it derives beside its artifact.
        await asyncio.to_thread(NodeCache(artifacts.cache_dir, artifacts.cache_size).evict)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """`stall_s`: the longest time that a step may take."""
        self._stall_s = user_config["stall_s"]

    def check_health(self) -> None:
        """Asked by Serve every second or two, which replaces a replica that raises. Raises EngineError."""
        self._engine.check_health(self._stall_s)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        with traced(request, "replica", "SERVER", self._span_attributes) as request:
            async for chunk in generate_text(self._engine, self._tokenizer, request):
                yield chunk

    async def tokenize(self, text: str | Conversation, add_special_tokens: bool) -> tuple[int, ...]:
        if isinstance(text, Conversation):
            return await off_the_loop(text, partial(self._tokenizer.encode_conversation, text))
        return await off_the_loop(text, partial(self._tokenizer.encode, text, add_special_tokens))

    async def tokenizer_info(self) -> dict[str, Any]:
        return self._tokenizer.info

    async def detokenize(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, self._engine.vocab_size)

    async def embed(self, prompt: Prompt, max_tokens: int | None) -> tuple[list[float], int]:
        return await embed_text(self._engine, self._tokenizer, prompt, max_tokens)

    async def info(self) -> dict[str, str | int | float]:
        cores = ",".join(map(str, self._claim.cores)) if self._claim else "any"
        return {"isa": isa_name(), **self._engine.info(), "pid": os.getpid(), "cores": cores}

    async def record_routing_stats(self) -> dict[str, Any]:
        """`info` by Serve's own way to ask a replica, which needs no place among `max_ongoing` requests: a full replica
        answers too."""
        return await self.info()
