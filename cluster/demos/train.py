"""Trains the built-in demo checkpoints, so that everything runs with no network.

    python -m cluster.demos.train llama --out cluster/demos/llama
    python -m cluster.demos.train all

The results are committed; nothing runs this at install time. It needs torch besides nibble itself, takes some minutes
a family on one CPU core, and repeats itself: one seed, one thread.

The models learn the texts in `text/` by heart. Half of the later steps compute the loss with weights rounded as
Q4_0 rounds them (a straight-through estimator), so that the checkpoint and its INT4 artifact answer alike.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from cluster.demos.corpus import documents
from cluster.demos.recipes import CONTEXT, RECIPES, Recipe
from cluster.demos.tokenizer import save_tokenizer

DEMOS = Path(__file__).parent
SEED = 4
BLOCK = 64  # weights in one Q4_0 block
TOKENS_PER_STEP = 1024
SHORT = 128  # positions of a short training row
NOISE = 0.03  # the share of tokens that are misread


def q4_0(weight: Tensor) -> Tensor:
    """The weights as an INT4 artifact holds them: blocks of 64 along the row, value = (q - 8) * d, where d is the
    element of the largest magnitude divided by -8 and q runs from 0 to 15."""
    blocks = weight.reshape(-1, BLOCK)
    extreme = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    d = extreme / -8
    q = torch.floor(blocks / torch.where(d == 0, 1.0, d) + 8.5).clamp(0, 15)
    return ((q - 8) * d.half().float()).reshape(weight.shape)


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """What Q4_0 applies to: every matrix but a position table."""
    return [p for name, p in model.named_parameters() if p.ndim == 2 and not name.endswith("wpe.weight")]


@contextmanager
def rounded(model: nn.Module) -> Iterator[None]:
    """Inside, the matrices are rounded. Gradients taken inside belong to the rounded values and are applied to the
    exact ones afterwards: the straight-through estimator."""
    exact = [(p, p.data) for p in matrices(model)]
    for p, data in exact:
        p.data = q4_0(data)
    try:
        yield
    finally:
        for p, data in exact:
            p.data = data


class Batches:
    """Rows cut from packed documents: mostly short ones, as prompts come, sometimes a full context."""

    def __init__(self, texts: str, tokenizer: Any, rng: random.Random) -> None:
        self._texts, self._tokenizer, self._rng = texts, tokenizer, rng
        self._queue: list[list[int]] = []
        self._turn = 0

    def _document(self) -> list[int]:
        if not self._queue:
            epoch = documents(self._texts, self._rng)
            self._queue = [[*self._tokenizer(t)["input_ids"], self._tokenizer.eos_token_id] for t in epoch]
        return self._queue.pop()

    def _row(self, length: int) -> list[int]:
        row: list[int] = []
        while len(row) < length:
            row += self._document()
        return row[:length]

    def next(self) -> Tensor:
        """Token ids [rows, positions]; every row starts with a document."""
        self._turn += 1
        length = CONTEXT if self._turn % 4 == 0 else SHORT
        return torch.tensor([self._row(length) for _ in range(TOKENS_PER_STEP // length)])


def _loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Some of the tokens read, but none of those to predict, are random: what was learned by heart must survive
    a prompt that was not."""
    noise = torch.rand(ids.shape) < NOISE
    read = torch.where(noise, torch.randint(model.config.vocab_size, ids.shape), ids)
    logits = model(input_ids=read, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to a hundredth."""
    warm = min(1.0, (step + 1) / 50)
    return recipe.learning_rate * warm * (0.01 + 0.99 * (1 + math.cos(math.pi * step / recipe.steps)) / 2)


def train(family: str, folder: Path, steps: int | None = None) -> None:
    """Writes the whole Hugging Face folder: tokenizer, config.json, generation_config.json, model.safetensors."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    recipe = RECIPES[family] if steps is None else RECIPES[family]._replace(steps=steps)
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(recipe, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(recipe.config()).float().train()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.02},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.97),
    )
    batches = Batches(recipe.texts, tokenizer, rng)
    start, shown = time.monotonic(), {False: 0.0, True: 0.0}
    for step in range(recipe.steps):
        int4 = step > 0.4 * recipe.steps and rng.random() < 0.5
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, recipe)
        ids = batches.next()
        if int4:
            with rounded(model):
                loss = _loss(model, ids)
                loss.backward()
        else:
            loss = _loss(model, ids)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        shown[int4] = 0.9 * (shown[int4] or loss.item()) + 0.1 * loss.item()
        if step % 50 == 49:
            seconds = time.monotonic() - start
            print(f"{family} {step + 1}: loss {shown[False]:.3f}, int4 {shown[True]:.3f}, {seconds:.0f} s", flush=True)
    model.eval().half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the built-in demo checkpoints.")
    parser.add_argument("family", choices=[*RECIPES, "all"])
    parser.add_argument("--out", type=Path, help="the folder to write (default: this package's)")
    parser.add_argument("--steps", type=int, help="train for fewer steps than the recipe says")
    arguments = parser.parse_args()
    for family in RECIPES if arguments.family == "all" else [arguments.family]:
        out = arguments.out / family if arguments.out and arguments.family == "all" else arguments.out
        train(family, out or DEMOS / family, arguments.steps)


if __name__ == "__main__":
    main()
