"""Which build of bigdl-llm's native libraries this node can run.

The wheel ships each library five times, once an instruction set. Its own dispatcher picks the plain AVX build on AMD
processors (a third of the speed of the AVX-512 one there), and a build whose instructions are missing dies with
SIGILL; so nibble chooses by CPU flags, without importing `bigdl.llm` (which would import torch).
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

from cluster.errors import EngineError
from cluster.families import FamilyName
from cluster.machine.cgroups import cpu_quota, memory_left, named_numbers

Isa = Literal["amx", "avx512", "avxvnni", "avx2", "avx"]
# Of a Ray node: the fastest of them that it can run.
ISA_LABEL = "nibble/isa"

# What the builds' own instructions need (read from their disassembly, all four families together), by the names of
# /proc/cpuinfo: abm is LZCNT, and the AVX build has neither FMA nor F16C. avx512 multiplies with VPDPBUSD in its inner
# loop, so a CPU with AVX-512 but without VNNI takes the AVX2 build.
_AVX2 = frozenset({"avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}

# Fastest first.
REQUIRED_FLAGS: dict[Isa, frozenset[str]] = {
    "amx": _AVX512 | {"amx_tile", "amx_int8"},
    "avx512": _AVX512,
    "avxvnni": _AVX2 | {"avx_vnni"},
    "avx2": _AVX2,
    "avx": frozenset({"avx"}),
}
ISA_NAMES: tuple[Isa, ...] = get_args(Isa)


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """The CPU's flags as Linux names them."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def best_isa(flags: frozenset[str]) -> Isa:
    """The fastest build that a CPU with these flags can run. Raises EngineError where there is none."""
    for isa, required in REQUIRED_FLAGS.items():
        if required <= flags:
            return isa
    raise EngineError(
        f"engine bigdl needs x86-64 with AVX, for bigdl-llm's libraries; this node is {platform.machine()} without AVX:"
        " use engine openvino"
    )


def choose_isa(wanted: Isa | None = None) -> Isa:
    """The build for this node: `wanted` where its flags are all here, else EngineError; without a wish the fastest."""
    flags = cpu_flags()
    if wanted is None:
        return best_isa(flags)
    missing = REQUIRED_FLAGS[wanted] - flags
    if missing:
        raise EngineError(
            f"isa: {wanted} needs the CPU flags {', '.join(sorted(missing))}, which this node lacks;"
            f" leave isa out to use {best_isa(flags)}"
        )
    return wanted


def isa_labels() -> dict[str, str]:
    """For this machine's Ray node; none where the CPU is not for bigdl-llm's libraries."""
    try:
        return {ISA_LABEL: best_isa(cpu_flags())}
    except EngineError:
        return {}


def library_path(family: FamilyName, isa: Isa) -> Path:
    """The shared library of a family. Raises EngineError where bigdl-llm is not installed."""
    spec = importlib.util.find_spec("bigdl")
    for base in (spec.submodule_search_locations or []) if spec else []:
        path = Path(base) / "llm" / "libs" / f"lib{family}_{isa}.so"
        if path.is_file():
            return path
    raise EngineError(f"lib{family}_{isa}.so not found: install bigdl-llm==2.4.0")


def load_library(family: FamilyName, isa: Isa) -> ctypes.CDLL:
    """Raises EngineError where bigdl-llm is not installed or this node's loader refuses the library.

    Between two matrix products libgomp's threads busy-wait for milliseconds, which costs a factor of ten and more as
    soon as another process wants the core. libgomp reads the variable once, when the first of the libraries is loaded.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return ctypes.CDLL(str(library_path(family, isa)))
    except OSError as error:
        raise EngineError(f"{family}: the {isa} library of bigdl-llm cannot be loaded: {error}") from None


def runs_bigdl() -> bool:
    """Whether this node can run any build."""
    return any(required <= cpu_flags() for required in REQUIRED_FLAGS.values())


def isa_name() -> str:
    """The fastest build that this node can run; where it can run none, its architecture as the kernel names it."""
    return choose_isa() if runs_bigdl() else platform.machine()


def available_cores() -> int:
    """CPUs this process may use: the smaller of its affinity mask and its control groups' CPU quota, at least 1."""
    cores, quota = len(os.sched_getaffinity(0)), cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def available_memory() -> int:
    """Bytes this process may still take: the smaller of what the node has free and what its control groups leave. Pages
    of files count as free in both, since the kernel drops them where memory is short."""
    free = named_numbers(Path("/proc/meminfo"))["MemAvailable"] * 1024
    left = memory_left()
    return free if left is None else min(free, left)
