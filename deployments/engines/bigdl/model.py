"""A native model with bounds and prefix reuse: the same request always gives the same logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path

import numpy as np

from cluster.artifacts.manifest import Manifest
from cluster.errors import ArtifactError, EngineError, InvalidRequestError
from cluster.families import FAMILIES
from cluster.machine.isa import Isa
from deployments.engines.base import Logits
from deployments.engines.bigdl.library import Floats, NativeModel, load_native
from deployments.engines.requests import check_ids, check_prompt

# Tokens of a prompt evaluated as one batch. Larger ones are not faster on any family, and bloom's library sizes its
# work space for short contexts: a batch of 512 at 2,048 tokens of context makes it abort.
# The batch also bounds the library's work space, which stays allocated: bloom's keeps every intermediate result of all
# layers. With 24 layers of width 1,024 and a vocabulary of 250,880 tokens, a first batch of 32 takes 163 MiB, with the
# KV cache of its tokens; one of 8 takes 23 MiB, but a prompt then takes half as long again.
BLOCK = 32


class PrefillCancelledError(Exception):
    """The request was cancelled between two blocks (or tokens) of its prompt."""


class CachedModel:
    """One sequence at a time over a NativeModel.

    The libraries' logits depend a little on how tokens were batched (relative noise 0.01 to 0.1, enough to turn a
    draw). Prompts are therefore cut into blocks at multiples of BLOCK, and only such blocks are reused by a later
    prompt, while what was decoded token by token is evaluated anew. So a request's logits are a function of the request
    alone, bit for bit, whatever was evaluated before it.
    """

    def __init__(self, native: NativeModel, context: int) -> None:
        self.vocab_size = native.vocab_size
        self.mapped_bytes = native.mapped_bytes
        self.context = context
        self._native = native
        self._tokens: list[int] = []  # in the KV cache
        self._in_blocks = 0  # how many of them, from the first on, were evaluated as whole blocks

    def prefill(self, prompt: Sequence[int], cancelled: Callable[[], bool] = lambda: False) -> tuple[Logits, int]:
        """Starts a sequence. Returns the logits after the prompt and how many of its tokens were taken from the cache.

        Raises InvalidRequestError for a prompt that is empty, leaves no room in the context or has ids outside the
        vocabulary, PrefillCancelledError when `cancelled()` turned true before a block, EngineError for a failure.
        """
        return self._prefill(prompt, cancelled, self._native.evaluate)

    def decode(self, token: int) -> Logits:
        """Appends one token to the sequence and returns the logits after it, valid until the next call."""
        if len(self._tokens) >= self.context:
            raise EngineError(f"context: {self.context} tokens are in it already, one more was to be decoded")
        return self._evaluate([token], len(self._tokens), self._native.evaluate)

    def embed(self, prompt: Sequence[int], cancelled: Callable[[], bool] = lambda: False) -> tuple[Floats, int]:
        """As `prefill`, but gives the last token's hidden state after the final norm, [width], for the logits."""
        return self._prefill(prompt, cancelled, self._native.embed)

    def logits_before(self, prompt: Sequence[int], cancelled: Callable[[], bool] = lambda: False) -> Iterator[Logits]:
        """For every token of the prompt but the first the logits that foretell it, each until the next is taken. They
        too are a function of the prompt alone. Raises as `prefill` does."""
        self.check_prompt(prompt)
        self.forget()  # every position is evaluated, and not by all libraries as whole blocks
        ids = list(prompt[:-1])
        for start in range(0, len(ids), BLOCK):
            rows = self._native.evaluate_each(ids[start : start + BLOCK], start)
            for position, logits in enumerate(rows, start + 1):
                if cancelled():
                    raise PrefillCancelledError
                _check_finite(logits, position)
                yield logits

    def all_logits(self, tokens: Sequence[int]) -> Logits:
        """Copies of the logits at every position, [tokens, vocab_size], as decoding token by token sees them."""
        self.check_prompt(tokens)
        self.forget()
        return np.stack([self.decode(token).copy() for token in tokens])

    def tokenize(self, text: bytes) -> list[int]:
        """Ids by the library's own tokenizer."""
        if b"\0" in text:
            raise InvalidRequestError("prompt: the bigdl-llm tokenizer takes no NUL character", field="prompt")
        return self._native.tokenize(text) if text else []

    def detokenize(self, tokens: Sequence[int]) -> bytes:
        """Bytes, since a character may be spread over several tokens. bloom's library knows a partial character only as
        U+FFFD."""
        check_ids(tokens, self.vocab_size)
        return b"".join(self._native.token_bytes(token) for token in tokens)

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Raises InvalidRequestError(field="prompt") for what the library must not see."""
        check_prompt(prompt, self.context, self.vocab_size)

    def forget(self) -> None:
        """Nothing of the cache is reused from here on."""
        self._tokens, self._in_blocks = [], 0

    def check_integrity(self) -> None:
        """Raises EngineError where the books do not add up."""
        if not (self._in_blocks <= len(self._tokens) <= self.context and self._in_blocks % BLOCK == 0):
            raise EngineError(
                f"KV cache: {self._in_blocks} tokens in blocks of {len(self._tokens)}, context {self.context}"
            )

    def close(self) -> None:
        self._native.close()

    def _reusable(self, ids: list[int]) -> int:
        """Tokens of the common prefix in whole blocks, leaving at least one token to evaluate."""
        pairs = zip(self._tokens[: self._in_blocks], ids[:-1], strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return common // BLOCK * BLOCK

    def _prefill(
        self, prompt: Sequence[int], cancelled: Callable[[], bool], evaluate: Callable[[Sequence[int], int], Floats]
    ) -> tuple[Floats, int]:
        """What `evaluate` gives for the last block, and how many tokens were taken from the cache."""
        self.check_prompt(prompt)
        ids = list(prompt)
        reused = self._reusable(ids)
        result: Floats | None = None
        for start in range(reused, len(ids), BLOCK):
            if cancelled():
                raise PrefillCancelledError
            block = ids[start : start + BLOCK]
            last = start + BLOCK >= len(ids)
            result = self._evaluate(block, start, evaluate if last else self._native.evaluate)
            if len(block) == BLOCK:
                self._in_blocks = start + BLOCK
        assert result is not None, "at least one block is evaluated"
        return result, reused

    def _evaluate(self, batch: list[int], past: int, evaluate: Callable[[Sequence[int], int], Floats]) -> Floats:
        kept, self._tokens = self._tokens[:past], []
        self._in_blocks, in_blocks = 0, min(self._in_blocks, past)
        result = evaluate(batch, past)
        _check_finite(result, past + len(batch))
        # Only now, so that after a failure nothing is reused.
        kept.extend(batch)
        self._tokens, self._in_blocks = kept, in_blocks
        return result


def _check_finite(numbers: Floats, count: int) -> None:
    if not np.isfinite(numbers).all():
        raise EngineError(f"the logits after {count} tokens are not finite: the artifact or the checkpoint is damaged")


def position_rows(manifest: Manifest) -> int | None:
    """Of the artifact's position table; None where it has none, and the context is not limited."""
    table = FAMILIES[manifest.family].container.positions
    return next((tensor.shape[0] for tensor in manifest.tensors if tensor.name == table), None)


def load_model(folder: Path, threads: int, context: int, isa: Isa, quiet: bool = True) -> CachedModel:
    """Loads the artifact in `folder`. Raises ArtifactError for files that do not fit the manifest, EngineError for an
    artifact that is for other engines, a context that the model has not and what the library refuses."""
    manifest = Manifest.read(folder)
    if "bigdl" not in manifest.engines:  # the library would abort the process, or compute something else
        raise EngineError(
            f"{folder}: engine: found bigdl, this {manifest.family} artifact allows {', '.join(manifest.engines)}"
        )
    binary = folder / manifest.binary
    if not binary.is_file() or binary.stat().st_size != manifest.bytes:
        found = f"{binary.stat().st_size} bytes" if binary.is_file() else "no such file"
        raise ArtifactError(f"{binary}: found {found}, the manifest says {manifest.bytes} bytes: fetch it again")
    positions = position_rows(manifest)
    if context < 1 or (positions is not None and context > positions):
        allowed = f"1 to {positions}" if positions is not None else "1 and more"
        raise EngineError(f"context: found {context}, allowed for this {manifest.family} model is {allowed}")
    # A library allocates the positions that the file has, whatever it is asked for.
    native = load_native(binary, manifest.family, isa, threads, context, quiet)
    try:
        native.share_weights(binary, manifest.tensors)
    except OSError as error:
        native.close()
        raise EngineError(f"{binary}: the system does not map this file into memory: {error.strerror}") from error
    output = FAMILIES[manifest.family].container.output
    vocab_size = next((tensor.shape[0] for tensor in manifest.tensors if tensor.name == output), None)
    if vocab_size != native.vocab_size:
        native.close()
        raise ArtifactError(f"{binary}: its vocabulary has {native.vocab_size} tokens, the manifest says {vocab_size}")
    return CachedModel(native, context)
