"""Writes logits/{name}.npz: what transformers computes, in fp32, with the weights that an artifact holds.

    python -m tests.reference.make_logits [NAME ...]            (needs torch; CI only reads the files)

Every matrix that the converter quantizes is quantized by bigdl-llm's library and dequantized again, so that an engine
which runs the artifact should find the same logits but for rounding. NAME is a family, for its demo checkpoint, or a
shape of tests/random_checkpoint.py. Run it again after training a demo checkpoint or changing a shape.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from cluster.artifacts.ggml import data_bytes
from cluster.checkpoints.hyperparameters import read_hyperparameters
from cluster.checkpoints.sources import DEMOS
from cluster.checkpoints.weights import WeightsReader, weight_sources
from cluster.conversion.layouts import base_name
from cluster.conversion.quantize import quantizer
from cluster.families import FAMILIES, FAMILY_NAMES, FamilyName
from tests.ggml_weights import dequantize
from tests.random_checkpoint import (
    OPENVINO_SHAPES,
    SHAPES,
    TIED_SHAPES,
    Tensors,
    write_lively_weights,
    write_random_checkpoint,
    write_safetensors,
)

OUT = Path(__file__).parent / "logits"
TOKENS = 48
TOKENS_OF_TIED = 16
# Besides those that engine openvino alone runs: key and value heads that artifacts repeat, and other forms of a layer.
CONVERTED = ("llama-grouped", "gptneox-sequential", "gptneox-tied", "bloom-wide", "starcoder-wide")
RANDOM = {**{name: SHAPES[name] for name in CONVERTED}, **OPENVINO_SHAPES, **TIED_SHAPES}


def logits_of(folder: Path, family: FamilyName, ids: list[int]) -> np.ndarray:
    with tempfile.TemporaryDirectory() as scratch:
        write_safetensors(Path(scratch) / "model.safetensors", dequantized_tensors(folder, family))
        shutil.copy(folder / "config.json", scratch)
        loaded = AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return loaded.eval()(torch.tensor([ids])).logits[0].numpy()


def dequantized_tensors(folder: Path, family: FamilyName) -> Tensors:
    config, native = json.loads((folder / "config.json").read_text()), quantizer(family)
    rules = {rule.source: rule for rule in FAMILIES[family].tensors(read_hyperparameters(folder, config, family))}
    tensors: Tensors = {}
    with WeightsReader(folder) as reader:
        for name, source in weight_sources(folder).items():
            rule = rules.get(base_name(name, FAMILIES[family].layout))
            if rule is None:  # a buffer
                continue
            values = reader.rows(source, 0, source.shape[0])
            if source.type == "BF16":
                values = (values.astype(np.uint32) << 16).view(np.float32)
            values = values.astype(np.float32)
            if rule.rounded:
                values = native.rounded_to_half(values)
            if rule.type == "quantized":
                blocks = np.empty(data_bytes("q4_0", values.shape), np.uint8)
                native.quantize(values, blocks)
                values = dequantize(blocks, "q4_0", values.shape)
            tensors[name] = ("F32", source.shape, values.tobytes())
    return tensors


def main() -> None:
    OUT.mkdir(exist_ok=True)
    for name in sys.argv[1:] or [*FAMILY_NAMES, *RANDOM]:
        with tempfile.TemporaryDirectory() as scratch:
            if name in FAMILY_NAMES:
                folder, family = DEMOS / name, name
                ids = json.loads((OUT.parent / "agreement" / f"{name}.json").read_text())["input_ids"][:TOKENS]
            else:
                folder, family = (
                    write_random_checkpoint(Path(scratch), RANDOM[name], write=write_lively_weights),
                    RANDOM[name].family,
                )
                count = TOKENS_OF_TIED if name in TIED_SHAPES else TOKENS
                ids = [(37 * i + 11) % RANDOM[name].vocabulary for i in range(count)]
            logits = logits_of(folder, family, ids)
        np.savez_compressed(OUT / f"{name}.npz", input_ids=ids, logits=logits.astype(np.float16))
        print(f"{name}: {(OUT / f'{name}.npz').stat().st_size} bytes, RMS {logits.std():.3f}")


if __name__ == "__main__":
    main()
