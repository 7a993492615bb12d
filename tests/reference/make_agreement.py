"""Writes agreement/{family}.json: what transformers' fp32 logits say comes next in a fixed text.

    python tests/reference/make_agreement.py            (needs torch; CI only reads the files)

The tests hold the INT4 runtimes against these files: at 90% of the positions or more, the most likely next token must
be the same. Run it again after training a demo checkpoint: `digest` is the sha256 of the weights it belongs to.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
DEMOS = ROOT / "cluster" / "demos"
OUT = Path(__file__).resolve().parent / "agreement"
LONGEST = 480  # tokens; the demos' context is 512


def text_of(family: str, tokenizer: AutoTokenizer) -> str:
    """Every fifth question (or function) of the demo's own text, as many as fit, one conversation (or module)."""
    name, separator = ("code.txt", "\n\n\n") if family == "starcoder" else ("qa.txt", "\n")
    blocks = (DEMOS / "text" / name).read_text("utf-8").strip().split("\n\n")
    pieces: list[str] = []
    for block in [b for start in (0, 3) for b in blocks[start::5] if not b.startswith((" ", "class"))]:
        piece = block if family == "starcoder" else " ".join((block.splitlines()[0], block.splitlines()[-1]))
        if len(tokenizer(separator.join([*pieces, piece]), verbose=False)["input_ids"]) > LONGEST:
            break
        pieces.append(piece)
    return separator.join(pieces)


def agreement(family: str) -> dict[str, object]:
    folder = DEMOS / family
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = text_of(family, tokenizer)
    input_ids = tokenizer(text)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([input_ids])).logits[0]
    return {
        "text": text,
        "input_ids": input_ids,
        "greedy_next": logits.argmax(-1).tolist(),
        "digest": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
    }


def main() -> None:
    OUT.mkdir(exist_ok=True)
    for family in sys.argv[1:] or ["llama", "gptneox", "bloom", "starcoder"]:
        document = json.dumps(agreement(family), ensure_ascii=False)
        (OUT / f"{family}.json").write_text(document + "\n", "utf-8")
        print(f"{family}: {len(document)} bytes")


if __name__ == "__main__":
    main()
