"""bloom's and starcoder's weights lie in the mapped artifact, and nothing that is computed changes by it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from cluster.artifacts.manifest import Manifest, Quantization
from cluster.families import FAMILY_NAMES, FamilyName
from cluster.machine.isa import REQUIRED_FLAGS, Isa, choose_isa, cpu_flags
from deployments.engines.bigdl import mapped_tensors
from deployments.engines.bigdl.engine import BigdlEngine
from deployments.engines.bigdl.library import load_native
from deployments.engines.bigdl.model import CachedModel, load_model
from tests.conftest import DEMOS, convert_here
from tests.integration.engines.test_bigdl_engine import CONTEXT, Artifact, ids

RUNNABLE = [isa for isa, flags in REQUIRED_FLAGS.items() if flags <= cpu_flags()]


def matrix_bytes(folder: Path) -> int:
    return sum(entry.bytes for entry in Manifest.read(folder).tensors if entry.type != "f32")


def load_private(folder: Path, threads: int, isa: Isa) -> CachedModel:
    """As the library itself loads it: the weights in memory of this process alone."""
    manifest = Manifest.read(folder)
    native = load_native(folder / manifest.binary, manifest.family, isa, threads, CONTEXT, True)
    return CachedModel(native, CONTEXT)


def everything(model: CachedModel) -> Iterator[npt.NDArray[np.float32]]:
    """Copies of what an engine asks a model for."""
    prompt = ids(31, 75)
    yield model.prefill(prompt)[0].copy()
    for token in ids(32, 12):
        yield model.decode(token).copy()
    yield model.embed(prompt)[0].copy()
    yield from (logits.copy() for logits in model.logits_before(prompt[:40]))
    yield model.prefill(ids(33, 10))[0].copy()


def kib(smaps: str, binary: Path) -> dict[str, int]:
    """Sums of the fields of /proc/PID/smaps over the mappings of a file."""
    sums: dict[str, int] = {}
    inside = False
    for line in smaps.splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(binary))
        elif inside and line.endswith(" kB"):
            name, _, value = line.partition(":")
            sums[name] = sums.get(name, 0) + int(value.split()[0])
    return sums


@pytest.mark.parametrize("isa", RUNNABLE)
@pytest.mark.parametrize(("family", "quantization"), [("bloom", "q4_0"), ("starcoder", "q4_0"), ("starcoder", "q8_0")])
def test_logits_are_those_of_private_weights_bit_for_bit(
    tmp_path: Path, family: FamilyName, quantization: Quantization, isa: Isa
) -> None:
    folder = convert_here(DEMOS / family, family, tmp_path / "artifact", quantization)
    for threads in (1, 2):
        private, mapped = load_private(folder, threads, isa), load_model(folder, threads, CONTEXT, isa)
        assert private.mapped_bytes == 0
        assert mapped.mapped_bytes == matrix_bytes(folder)
        for left, right in zip(everything(private), everything(mapped), strict=True):
            assert np.array_equal(left, right)
        private.close()
        mapped.close()


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_page_of_the_mapped_file_is_that_of_the_page_cache_after_requests(
    demo_artifact: Artifact, family: FamilyName
) -> None:
    folder = demo_artifact(family)
    binary = folder / Manifest.read(folder).binary
    model = load_model(folder, 1, CONTEXT, choose_isa())
    assert sum(1 for _ in everything(model)) > 0
    pages = kib(Path("/proc/self/smaps").read_text(), binary)
    assert pages["Size"] * 1024 >= model.mapped_bytes == matrix_bytes(folder)
    # Its pages are in use, and all are the page cache's: none is a copy.
    assert pages["Rss"] * 1024 > 0.9 * model.mapped_bytes
    assert pages["Anonymous"] == 0
    model.close()
    assert kib(Path("/proc/self/smaps").read_text(), binary) == {}


@pytest.mark.parametrize("family", ["bloom", "starcoder"])
def test_a_library_whose_tensors_are_not_found_keeps_them_and_works(
    demo_artifact: Artifact,
    family: FamilyName,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = demo_artifact(family)
    monkeypatch.setattr(mapped_tensors, "find_tensors", lambda handle: iter(()))
    with caplog.at_level(logging.WARNING, "ray.serve"):
        model = load_model(folder, 1, CONTEXT, choose_isa())
    assert "each replica holds a copy" in caplog.text
    assert model.mapped_bytes == 0
    private = load_private(folder, 1, choose_isa())
    assert np.array_equal(model.prefill(ids(34, 50))[0], private.prefill(ids(34, 50))[0])
    model.close()
    private.close()


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_engine_tells_how_much_is_mapped(demo_artifact: Artifact, family: FamilyName) -> None:
    engine = BigdlEngine(demo_artifact(family), threads=1, context=CONTEXT)
    assert engine.info()["mapped_bytes"] == matrix_bytes(demo_artifact(family))
    engine.close()


@pytest.mark.parametrize("family", ["bloom", "starcoder"])
def test_models_of_one_file_come_and_go_without_harm_to_each_other(demo_artifact: Artifact, family: FamilyName) -> None:
    stays = load_model(demo_artifact(family), 1, CONTEXT, choose_isa())
    wanted = [logits.copy() for logits in everything(stays)]
    for _ in range(5):
        passes = load_model(demo_artifact(family), 1, CONTEXT, choose_isa())
        passes.prefill(ids(35, 40))
        passes.close()
        assert all(np.array_equal(left, right) for left, right in zip(wanted, everything(stays), strict=True))
    stays.close()
