"""A Hugging Face checkpoint folder: its config.json, the files that go beside an artifact, and its digest.

Nothing in a checkpoint is ever executed: no trust_remote_code, no pickle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from cluster.artifacts.verified import remembered_sha256
from cluster.checkpoints.checkpoint_files import open_binary, read_json_object, read_without_mark
from cluster.checkpoints.weights import content_sha256, weight_files
from cluster.errors import CheckpointError
from cluster.families import ELSEWHERE, FAMILIES, FamilyName, architecture_names, fitting_family
from cluster.machine.isa import available_cores

CONFIG_FILE = "config.json"
# The files of chat templates, with the templates' names. transformers writes those that are not the default into a
# folder of their own. A later file of a name replaces an earlier one.
TEMPLATE_FILES = {
    "chat_template.jinja": "default",
    "additional_chat_templates/default.jinja": "default",
    "additional_chat_templates/tool_use.jinja": "tool_use",
}
# What transformers reads to tokenize and generate: everything an engine may want beside the binary.
COMPANION_FILES = (
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    *TEMPLATE_FILES,
)
TEXT_SUFFIXES = (".json", ".jinja", ".txt")


class PlanningFolder(NamedTuple):
    """A folder to plan from, and the sha256 of the files in it of which only the beginning is real."""

    folder: Path
    sha256: Mapping[str, str]


def read_config(checkpoint: Path) -> dict[str, Any]:
    """config.json. Raises CheckpointError for what is no checkpoint folder."""
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"{checkpoint}: not a folder; allowed is a Hugging Face checkpoint folder (config.json, weights, tokenizer)"
        )
    path = checkpoint / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{checkpoint}: not a checkpoint: it has no {CONFIG_FILE}")
    return read_json_object(path)


def companion_files(checkpoint: Path) -> tuple[str, ...]:
    """The names of the files that go beside the binary, as far as the checkpoint has them."""
    return tuple(name for name in COMPANION_FILES if (checkpoint / name).is_file())


def read_companion(path: Path) -> bytes:
    """The content of one of them, as the artifact gets it: text without a byte order mark, so that whatever reads the
    artifact's files needs to know of none."""
    if path.suffix in TEXT_SUFFIXES:
        return read_without_mark(path)
    return path.read_bytes()


def check_companions(checkpoint: Path) -> None:
    """Raises CheckpointError for a file beside the weights that cannot be what its name says: JSON that is none, or a
    Git LFS pointer. Every reader of them, transformers among them, may then take them as they are."""
    for name in companion_files(checkpoint):
        if name.endswith(".json"):
            read_json_object(checkpoint / name)
        else:
            open_binary(checkpoint / name).close()


def check_links(checkpoint: Path) -> None:
    """Raises CheckpointError for a file beside the weights that is a link to one elsewhere: its content would get into
    the artifact, for everyone to read. The Hub's cache links from a snapshot's folder to the repository's blobs."""
    folder = checkpoint.resolve()
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    for name in companion_files(checkpoint):
        target = (checkpoint / name).resolve()
        if not (target.is_relative_to(folder) or target.is_relative_to(blobs)):
            raise CheckpointError(
                f"{checkpoint / name}: found a link to {target}, outside of the checkpoint; put the file itself there"
            )


def check_family(checkpoint: Path, config: dict[str, Any], family: FamilyName) -> None:
    """Raises CheckpointError where config.json describes another family's model; the message says which fits."""
    row, model_type, architectures = FAMILIES[family], config.get("model_type"), config.get("architectures")
    fits, names = fitting_family(model_type, architectures), architecture_names(architectures)
    if fits == family:
        return
    if names and fitting_family(None, architectures) != family:
        described, allowed = f"architectures: found {', '.join(names)}", row.architectures
    else:
        described, allowed = f"model_type: found {model_type!r:.100}", row.model_types
    advice = f"this is family {fits}: convert it as that" if fits else "no family of nibble fits this checkpoint"
    advice = next((ELSEWHERE[name] for name in names if name in ELSEWHERE), advice)
    raise CheckpointError(
        f"{checkpoint / CONFIG_FILE}: {described}; family {family} allows {', '.join(allowed)}; {advice}"
    )


def checkpoint_digest(
    checkpoint: Path, known_sha256: Mapping[str, str] | None = None, memory: Path | None = None
) -> str:
    """sha256 over the name, length and sha256 of every file that a conversion uses. The first half of an artifact's
    content address: two checkpoints with the same content have the same digest, in whatever folder or on the Hub.
    `known_sha256`: of files that need not be read, by name. `memory`: a folder that remembers the sha256 of weights, so
    that only those that have changed are read. Raises CheckpointError for a file that is read and does not
    have the checksums that are in it."""
    read_config(checkpoint)
    known = known_sha256 or {}
    names = (*companion_files(checkpoint), *weight_files(checkpoint))
    digest = hashlib.sha256()
    with ThreadPoolExecutor(available_cores()) as pool:
        hashes = pool.map(lambda name: known.get(name) or weights_sha256(checkpoint / name, memory), names)
        for name, sha256 in zip(names, hashes, strict=True):
            digest.update(f"{name}\0{(checkpoint / name).stat().st_size}\0{sha256}\0".encode())
    return digest.hexdigest()


def weights_sha256(path: Path, memory: Path | None) -> str:
    return content_sha256(path) if memory is None else remembered_sha256(path, memory, content_sha256)
