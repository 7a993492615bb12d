"""Runs a command and measures it with all its descendants: wall time, peak memory, bytes written to disk."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

SAMPLE_S = 0.1
SAMPLES_A_SUM = 2  # to sum proportional memory takes the kernel milliseconds of a core
PROC = Path("/proc")


@dataclass
class Measured:
    """Bytes and seconds. `peak` is the greatest sum of the processes' proportional memory (a page that n of them share
    counts 1/n in each), `private` that of what is no page of a file, which the kernel could drop; `largest` the
    greatest memory of one process while its title held `title`, without what lies in Ray's object store; `written` what
    went to files on disks, whether or not they were deleted later; `cpu_seconds` those of all that were waited for."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak: int = 0
    private: int = 0
    largest: int = 0
    written: int = 0
    output: str = ""
    _written_by: dict[int, int] = field(default_factory=dict)


class ProcessMemory(NamedTuple):
    """Bytes: anonymous, of memory that processes share (shmem, memfd; in proportion), of mapped files (the same)."""

    private: int
    shared: int
    mapped: int


def memory_of(pid: int) -> ProcessMemory:
    """Nothing of a process that has ended."""
    try:
        fields = _fields(pid, "smaps_rollup")
        return ProcessMemory(fields["Pss_Anon"], fields["Pss_Shmem"], fields["Pss_File"])
    except (OSError, KeyError):
        return ProcessMemory(0, 0, 0)


def title_of(pid: int) -> str:
    """The command line, which Ray's workers change to what they run; empty for a process that has ended."""
    try:
        return (PROC / str(pid) / "cmdline").read_text()
    except OSError:
        return ""


def measure(
    command: Sequence[str], environment: dict[str, str], cwd: Path, title: str, timeout: float = float("inf")
) -> Measured:
    """Raises RuntimeError with the command's output where it fails, or takes longer than `timeout` seconds."""
    result, started, cpu_before = Measured(), time.perf_counter(), _children_cpu()
    with subprocess.Popen(
        command, env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        known = {child.pid}
        count = 0
        try:
            while child.poll() is None:
                known |= descendants(known)
                _sample(known, title, result, with_sum=count % SAMPLES_A_SUM == 0)
                count += 1
                time.sleep(SAMPLE_S)
                if time.perf_counter() - started > timeout:
                    child.kill()
        finally:
            child.kill()
        result.seconds, result.cpu_seconds = time.perf_counter() - started, _children_cpu() - cpu_before
        assert child.stdout is not None
        result.output = child.stdout.read()
    result.written = sum(result._written_by.values())
    if child.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}: {result.output[-2000:]}")
    return result


def descendants(known: set[int]) -> set[int]:
    """Of processes seen before, too: they may have ended and left theirs behind."""
    parents = {}
    for process in PROC.glob("[0-9]*"):
        try:
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it ended meanwhile
    found: set[int] = set()
    while new := {pid for pid, parent in parents.items() if parent in known | found} - found:
        found |= new
    return found


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _sample(pids: set[int], title: str, result: Measured, with_sum: bool) -> None:
    memory = private = 0
    for pid in pids:
        try:
            if with_sum:
                pss = _fields(pid, "smaps_rollup")
                memory += pss["Pss"]
                private += pss["Pss_Anon"] + pss["Pss_Shmem"]
            result._written_by[pid] = _fields(pid, "io")["write_bytes"]
            if title in title_of(pid):
                status = _fields(pid, "status")
                result.largest = max(result.largest, status["RssAnon"] + status["RssFile"])
        except (OSError, KeyError):
            continue  # it has ended
    result.peak, result.private = max(result.peak, memory), max(result.private, private)


def _fields(pid: int, file: str) -> dict[str, int]:
    """Bytes by name, of the lines that are a number."""
    lines = [line.split() for line in (PROC / str(pid) / file).read_text().splitlines()]
    units = {2: 1, 3: 1024}  # words: NAME: NUMBER [kB]
    return {
        words[0][:-1]: int(words[1]) * units[len(words)]
        for words in lines
        if len(words) in units and words[1].isdigit()
    }


def read_once(folder: Path) -> None:
    """So that every measured run finds the files in memory, as far as there is room."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            while file.read(1 << 24):
                pass
