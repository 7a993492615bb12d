"""Runs a new artifact before it is published: `python -m deployments.engines.check FOLDER [--threads 1]`.

A child process, because the library aborts on some files instead of saying no. Exit code 0 for an artifact that loads
and computes; 1 and, as the last line on stderr, what is wrong otherwise; where the library aborts, a signal, with the
library's last words on stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.artifacts.ggml import BLOCK_WEIGHTS
from cluster.artifacts.manifest import Manifest, TensorEntry
from cluster.errors import ArtifactError, NibbleError
from cluster.machine.isa import choose_isa, runs_bigdl
from deployments.engines.agreement import CHECKED_TOKENS, relative_rms
from deployments.engines.bigdl.model import BLOCK, CachedModel, load_model, position_rows
from deployments.engines.ggml_blocks import BLOCKS
from deployments.engines.loading import require_openvino

# The greatest number that a block's scale is multiplied with.
GREATEST = {"q4_0": 8, "q8_0": 127}
SLAB_BYTES = 32 << 20

# Decoding and evaluating a batch round differently: a relative RMS of 0.1 was seen on random 26-layer models. What is
# computed from the wrong tokens or positions is unrelated: about 1.4.
BATCH_TOLERANCE = 0.5


def check_artifact(folder: Path, threads: int = 1) -> None:
    """On the first of its engines that this node can run. Raises NibbleError, naming what is wrong. The library may
    abort the process."""
    manifest = Manifest.read(folder)
    check_binary(folder / manifest.binary, manifest)
    if "bigdl" in manifest.engines and runs_bigdl():
        check_bigdl(folder, threads, manifest)
        return
    require_openvino()
    from deployments.engines.openvino.self_check import check_openvino

    check_openvino(folder, threads)


def check_bigdl(folder: Path, threads: int, manifest: Manifest) -> None:
    context = min(2 * BLOCK, position_rows(manifest) or 2 * BLOCK)
    # Not quiet: should the library abort, its last words are the only reason there is.
    model = load_model(folder, threads, context, choose_isa(), quiet=False)
    try:
        check_logits(model)
    finally:
        model.close()


def check_binary(binary: Path, manifest: Manifest) -> None:
    """The tensor table against the file: every tensor has the bytes that its shape and type need, in the file, beside
    the others, and its numbers are numbers. A shifted or mis-sized tensor shows here as absurd scales."""
    size = binary.stat().st_size
    end = 0
    for tensor in sorted(manifest.tensors, key=lambda tensor: tensor.offset):
        weights = int(np.prod(tensor.shape))
        block = BLOCKS.get(tensor.type)
        if block is not None and tensor.shape[-1] % BLOCK_WEIGHTS:
            raise ArtifactError(f"{tensor.name}: rows of {tensor.shape[-1]} weights, allowed are multiples of 64")
        needed = 4 * weights if block is None else weights // BLOCK_WEIGHTS * block.itemsize
        if tensor.bytes != needed or tensor.offset < end or tensor.offset + tensor.bytes > size:
            raise ArtifactError(
                f"{tensor.name}: the manifest puts {tensor.bytes} bytes at {tensor.offset}; its shape needs {needed}"
                f" between {end} and {size}"
            )
        end = tensor.offset + tensor.bytes
        check_numbers(binary, tensor)
    if end != size:
        raise ArtifactError(f"{binary.name}: the last tensor ends at {end}, the file at {size}")


def check_numbers(binary: Path, tensor: TensorEntry) -> None:
    """No NaN, no infinity, nothing that fp16 weights cannot have been quantized from."""
    kind = BLOCKS.get(tensor.type, np.dtype("<f4"))
    data = np.memmap(binary, kind, "r", tensor.offset, tensor.bytes // kind.itemsize)
    step = max(1, SLAB_BYTES // kind.itemsize)
    for start in range(0, len(data), step):
        slab: npt.NDArray[Any] = data[start : start + step]
        numbers = slab["scale"].astype(np.float32) * GREATEST[tensor.type] if tensor.type in BLOCKS else slab
        # The scale is rounded after the division, hence the margin.
        if not np.isfinite(numbers).all() or np.abs(numbers).max(initial=0) > 65504 * 1.001:
            raise ArtifactError(f"{tensor.name}: its weights are not finite fp16 numbers: the tensor is damaged")


def check_logits(model: CachedModel) -> None:
    """Finite (the model itself sees to that), different from token to token and from one prompt to another, and the
    same whether tokens come one by one or as a batch, also after another sequence was evaluated."""
    length = min(CHECKED_TOKENS, model.context)
    tokens = [(7 * index + 1) % model.vocab_size for index in range(length)]
    single = model.all_logits(tokens)
    if min(float(row.std()) for row in single) == 0 or (length > 1 and np.allclose(single[0], single[-1], rtol=1e-6)):
        raise ArtifactError("the logits do not depend on the token or on the prompt: the artifact is damaged")
    half = max(1, length // 2)
    whole, batch = model.prefill(tokens)[0].copy(), model.prefill(tokens[:half])[0].copy()
    model.prefill(tokens[half:] or tokens)
    again = model.prefill(tokens[:half])[0]
    for count, found in ((length, whole), (half, batch)):
        if relative_rms(found, single[count - 1]) > BATCH_TOLERANCE:
            raise ArtifactError(f"{count} tokens give other logits as a batch than one by one: the artifact is damaged")
    if not np.array_equal(batch, again):
        raise ArtifactError(f"the same {half} tokens give other logits the second time: the artifact is damaged")
    model.check_integrity()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deployments.engines.check", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with manifest.json and the binary")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    os.dup2(2, 1)  # the libraries' last words go to either
    try:
        check_artifact(arguments.folder, arguments.threads)
    except (NibbleError, OSError, ValueError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
