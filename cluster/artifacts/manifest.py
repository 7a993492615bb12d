"""The manifest of an artifact: what the INT4 binary holds, so that no engine parses it and every node can verify it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from cluster.families import EngineName, FamilyName

Quantization = Literal["q4_0", "q8_0"]
TensorType = Literal["f32", "q4_0", "q8_0"]

MANIFEST_FILE = "manifest.json"

# Of the binary in one chunk: a few seconds of one CPU, and a task of less than 512 MB with the worker's own memory.
SHARD_BYTES = 64 << 20


class Record(BaseModel):
    """Base of the records that cross a process: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorEntry(Record):
    """One tensor of the binary. `shape` is outermost first (rows, columns), as in numpy; `offset` and `bytes` locate
    its data in the file."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    offset: int
    bytes: int


class ChunkEntry(Record):
    """One contiguous piece of the binary, as it lies in the object store."""

    offset: int
    bytes: int
    sha256: str


class Manifest(Record):
    """`artifact_id` addresses the content: checkpoint digest, converter version and quantization. `files` maps the
    name of each file beside the binary (config.json, the tokenizer's) to its sha256. `engines`: those that can run
    it, at least one."""

    artifact_id: str
    converter_version: int
    family: FamilyName
    quantization: Quantization
    engines: tuple[EngineName, ...]
    source: str
    binary: str
    bytes: int
    sha256: str
    chunks: tuple[ChunkEntry, ...]
    tensors: tuple[TensorEntry, ...]
    files: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        return cls.model_validate_json((folder / MANIFEST_FILE).read_bytes())


def binary_name(family: FamilyName, quantization: Quantization) -> str:
    """The file name that bigdl-llm's own converter gives its output."""
    return f"bigdl_llm_{family}_{quantization}.bin"
