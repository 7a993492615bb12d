"""Faults of bigdl-llm's native libraries, each reproduced in a child process with the bare C API, and the workaround:
`bigdl_model.CachedModel` for what must not reach a library, `bigdl_library.ForwardApi` for bloom's and starcoder's API.

When one of these tests fails with a newer bigdl-llm, its workaround may go.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.families import FAMILY_NAMES, FamilyName
from cluster.machine.isa import choose_isa
from deployments.engines.bigdl.model import load_model
from tests.conftest import convert_here
from tests.random_checkpoint import Shape, write_random_checkpoint

Artifact = Callable[[FamilyName], Path]

PRELUDE = """
import ctypes, os, sys
from pathlib import Path
import numpy as np
from cluster.machine.isa import choose_isa
from cluster.artifacts.manifest import Manifest
from deployments.engines.bigdl.library import load_native
folder, context = Path(sys.argv[1]), int(sys.argv[2])
manifest = Manifest.read(folder)
native = load_native(folder / manifest.binary, manifest.family, choose_isa(), 1, context, True)
ids = [int(token) for token in np.random.default_rng(0).integers(3, 256, context + 1)]

def pointer(tokens):
    return (ctypes.c_int * len(tokens))(*tokens)

def bare_forward(tokens, batch=512):
    native._forward(native._handle, pointer(tokens), len(tokens), 1, 1, batch)
    return native._logits.copy()
"""


def child(code: str, folder: Path, context: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code, str(folder), str(context)], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_tokens_beyond_the_context_corrupt_memory(family: FamilyName, demo_artifact: Artifact) -> None:
    code = """
if hasattr(native, "_ids"):
    bare_forward(ids)
    for _ in range(20):
        bare_forward(ids[:9])
else:
    native._eval(native._handle, pointer(ids), len(ids), 0, 1)
    native.evaluate(ids[:9], 0)
native.close()
os._exit(0)
"""
    # starcoder's library allocates the 512 positions of the file whatever it is asked for.
    assert child(code, demo_artifact(family), 512).returncode < 0


@pytest.mark.parametrize("family", ["bloom", "starcoder"])
def test_logits_of_several_positions_move_the_buffer(family: FamilyName, demo_artifact: Artifact) -> None:
    code = """
count = ctypes.c_long(0)
eval_api = native._library.eval_api
address = lambda pointer: ctypes.addressof(pointer.contents)
def eval_one(tokens):
    return address(eval_api(native._handle, pointer(tokens), len(tokens), 1, 1, 512, ctypes.byref(count)))
assert eval_one(ids[:1]) == eval_one(ids[1:2]) == native._logits.ctypes.data
assert eval_one(ids[:400]) != native._logits.ctypes.data
os._exit(0)
"""
    done = child(code, demo_artifact(family), 512)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("family", ["bloom", "starcoder"])
def test_a_call_without_tokens_leaves_the_logits_of_the_one_before(family: FamilyName, demo_artifact: Artifact) -> None:
    code = """
before = bare_forward(ids[:5])
native._logits[0] = np.nan
assert np.isnan(bare_forward([])[0])
os._exit(0)
"""
    done = child(code, demo_artifact(family), 512)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("family", ["llama", "gptneox"])
def test_a_batch_gives_other_float_noise_than_its_tokens_one_by_one(
    family: FamilyName, demo_artifact: Artifact
) -> None:
    code = """
batch = native.evaluate(ids[:100], 0).copy()
for position in range(100):
    single = native.evaluate([ids[position]], position).copy()
assert not np.array_equal(batch, single)
assert np.abs(batch - single).max() < 0.2 * np.abs(single).max()
"""
    done = child(code, demo_artifact(family), 512)
    assert done.returncode == 0, done.stderr


def test_a_batch_of_512_makes_bloom_abort_where_blocks_do_not(tmp_path: Path) -> None:
    shape = Shape("bloom", width=256, heads=64, layers=16)
    folder = convert_here(write_random_checkpoint(tmp_path / "checkpoint", shape), "bloom", tmp_path / "artifact")
    aborted = child("bare_forward(ids[:1000])", folder, 1024)
    assert aborted.returncode < 0
    assert "not enough space" in aborted.stdout
    model = load_model(folder, 1, 1024, choose_isa())
    model.prefill([5] * 1024)
    model.close()
