"""Writes a checkpoint of random fp16 weights, as large as asked, in seconds and with little memory.

    python -m tests.bench.make_checkpoint FOLDER [--family llama --layers 26 --width 2048 --feed-forward 5504
                                                  --heads 16 --vocabulary 32000 --files 4]

The defaults are a llama of 1.4 billion weights: sharded safetensors of 2.8 GB with a sentencepiece tokenizer of the
same vocabulary. Every matrix is cut from one block of normal numbers, norms are 1 and biases 0.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cluster.checkpoints.hyperparameters import read_hyperparameters
from cluster.families import FAMILIES, FAMILY_NAMES
from tests.random_checkpoint import Shape, model_config, write_tokenizer

BLOCK = np.random.default_rng(0).normal(0, 0.02, 1 << 22).astype("<f2")
Shapes = dict[str, tuple[int, ...]]


def write_checkpoint(folder: Path, shape: Shape, files: int) -> None:
    folder.mkdir(parents=True)
    config = model_config(shape) | {"torch_dtype": "float16", "max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(folder, shape)
    layout, model = FAMILIES[shape.family].layout, read_hyperparameters(folder, config, shape.family)
    shapes: Shapes = {}
    for rule in FAMILIES[shape.family].tensors(model):
        if model.tied and rule.source == layout.output:
            continue
        shapes[rule.source if rule.source == layout.output else layout.prefix + rule.source] = rule.source_shape
    weight_map = {}
    for i, names in enumerate(parts(shapes, files)):
        file = f"model-{i + 1:05}-of-{files:05}.safetensors"
        write_file(folder / file, {name: shapes[name] for name in names})
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": sum(map(size, shapes.values()))}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def size(shape: tuple[int, ...]) -> int:
    return 2 * int(np.prod(shape))


def parts(shapes: Shapes, count: int) -> Iterator[list[str]]:
    """The tensors in order, cut into `count` lists of about the same bytes."""
    target, done, part = sum(map(size, shapes.values())) / count, 0, 0
    names: list[str] = []
    for name, shape in shapes.items():
        if names and done + size(shape) / 2 > target * (part + 1):
            yield names
            names, part = [], part + 1
        names.append(name)
        done += size(shape)
    yield names


def write_file(path: Path, shapes: Shapes) -> None:
    header, offset = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size(shape)]}
        offset += size(shape)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for number, (name, shape) in enumerate(shapes.items()):
            for piece in numbers(name, shape, number):
                file.write(piece)


def numbers(name: str, shape: tuple[int, ...], number: int, kind: str = "<f2") -> Iterator[bytes]:
    """A tensor's bytes in pieces; `number` says where in the block it begins."""
    left = int(np.prod(shape))
    if len(shape) == 1:
        yield np.full(left, 0 if name.endswith(".bias") else 1, kind).tobytes()
        return
    block, start = BLOCK.astype(kind, copy=False), number * 7919 % len(BLOCK)
    while left:
        piece = block[start : start + left]
        yield piece.tobytes()
        left, start = left - len(piece), 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--family", choices=FAMILY_NAMES, default="llama")
    defaults = {"layers": 26, "width": 2048, "feed_forward": 5504, "heads": 16, "vocabulary": 32000, "files": 4}
    for name, value in defaults.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    given = vars(parser.parse_args())
    folder, files = given.pop("folder"), given.pop("files")
    write_checkpoint(folder, Shape(**given), files)
    print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir()) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
