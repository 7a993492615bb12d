from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.errors import EngineError
from cluster.families import FAMILY_NAMES
from cluster.machine import isa as isa_module
from cluster.machine.isa import (
    ISA_NAMES,
    REQUIRED_FLAGS,
    Isa,
    available_cores,
    available_memory,
    best_isa,
    choose_isa,
    cpu_flags,
    isa_name,
    library_path,
)

# What Linux shows of the features that matter, by processor.
HASWELL = {"avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe", "sse4_2"}
SKYLAKE_SERVER = HASWELL | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}
CASCADE_LAKE = SKYLAKE_SERVER | {"avx512_vnni"}
ZEN_4 = CASCADE_LAKE | {"avx512_bf16", "avx512_vbmi", "sse4a"}
ALDER_LAKE = HASWELL | {"avx_vnni"}
SAPPHIRE_RAPIDS = CASCADE_LAKE | {"avx_vnni", "amx_tile", "amx_int8", "amx_bf16"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (SAPPHIRE_RAPIDS, "amx"),
        (SAPPHIRE_RAPIDS - {"amx_int8"}, "avx512"),
        (ZEN_4, "avx512"),
        (CASCADE_LAKE, "avx512"),
        (SKYLAKE_SERVER, "avx2"),
        (ALDER_LAKE, "avxvnni"),
        (HASWELL, "avx2"),
        (HASWELL - {"fma"}, "avx"),
        ({"avx", "sse4_2"}, "avx"),
    ],
)
def test_the_fastest_build_that_the_flags_allow_is_taken(flags: set[str], expected: Isa) -> None:
    assert best_isa(frozenset(flags)) == expected


def test_a_cpu_without_avx_is_refused() -> None:
    with pytest.raises(EngineError, match=r"needs x86-64 with AVX.* this node is .* without AVX: use engine openvino"):
        best_isa(frozenset({"sse4_2"}))


def test_a_node_that_runs_no_build_is_named_by_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert isa_name() == choose_isa()
    monkeypatch.setattr(isa_module, "cpu_flags", lambda: frozenset())
    assert isa_name() == "aarch64"


def test_a_wish_is_granted_where_its_flags_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa_module, "cpu_flags", lambda: frozenset(SKYLAKE_SERVER))
    assert choose_isa("avx") == "avx"
    assert choose_isa() == "avx2"
    with pytest.raises(EngineError, match=r"avx512 needs the CPU flags avx512_vnni.*leave isa out to use avx2"):
        choose_isa("avx512")


def test_every_build_is_in_the_wheel_for_every_family() -> None:
    assert tuple(REQUIRED_FLAGS) == ISA_NAMES
    for family in FAMILY_NAMES:
        for isa in ISA_NAMES:
            assert library_path(family, isa).is_file()


def test_flags_are_read_from_this_cpu() -> None:
    assert len(cpu_flags()) > 10
    assert best_isa(cpu_flags()) in ISA_NAMES


@pytest.mark.parametrize(
    ("quota", "cores"), [(None, 8), (2.5, 2), (0.5, 1), (16.0, 8)], ids=["none", "some", "less than one", "more"]
)
def test_a_cpu_quota_below_the_affinity_mask_counts(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    monkeypatch.setattr(isa_module, "cpu_quota", lambda: quota)
    assert available_cores() == cores


def test_available_memory_is_some_of_the_node_s() -> None:
    total = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    assert 0 < available_memory() <= total * 1024


def test_a_memory_limit_below_what_the_node_has_free_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa_module, "memory_left", lambda: None)
    free = available_memory()
    monkeypatch.setattr(isa_module, "memory_left", lambda: 1000)
    assert available_memory() == 1000
    monkeypatch.setattr(isa_module, "memory_left", lambda: 100 * free)
    assert available_memory() < 10 * free
