"""Writes digests.json: size and sha256 of what bigdl-llm's own converter makes of the checkpoints in the tests.

    python -m tests.reference.make_digests            all, from the repository's root
    python -m tests.reference.make_digests --only builtin:bloom llama-bf16 int8:llama

Run by hand whenever a demo checkpoint or tests/random_checkpoint.py changes; the tests notice a stale digest by the
sha256 of the weights. Needs an environment of its own: bigdl-llm==2.4.0, torch (made with 2.13, CPU), transformers 4
(made with 4.57.6: with transformers 5 llm_convert fails on gptneox for want of rotary_pct), accelerate, sentencepiece,
safetensors, numpy, pydantic. It runs `bigdl.llm.llm_convert` itself, with outtype "int4" and, for the entries
"int8:...", "int8"; to get past its faults it converts a copy of each folder in which

- llama's weights are a pytorch_model.bin, the only form that llm_convert finds, with a tied output written out, and
  key and value heads that several query heads share repeated for each of them;
- config.json has rotary_pct where transformers 5 wrote rope_parameters.partial_rotary_factor;
- tokenizer_config.json names PreTrainedTokenizerFast, which every version of transformers has.

None of it touches a number of the weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from cluster.families import FAMILY_NAMES
from tests.random_checkpoint import SHAPES, write_random_checkpoint

DIGESTS = Path(__file__).with_name("digests.json")
INT8 = "int8:"  # before the name of an entry
DEMOS = Path(__file__).parents[2] / "cluster" / "demos"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="leave the other entries as they are")
    only = parser.parse_args().only
    digests = json.loads(DIGESTS.read_text()) if DIGESTS.is_file() else {}
    families = {f"builtin:{f}": f for f in FAMILY_NAMES} | {n: s.family for n, s in SHAPES.items()}
    int8 = [f"{INT8}{name}" for name, family in families.items() if family != "bloom"]
    for entry in [*families, *int8]:
        if only and entry not in only:
            continue
        name = entry.removeprefix(INT8)
        with tempfile.TemporaryDirectory() as temporary:
            source = DEMOS / families[name]
            if not name.startswith("builtin:"):
                source = write_random_checkpoint(Path(temporary, "source"), SHAPES[name])
            outtype = "int8" if entry.startswith(INT8) else "int4"
            digests[entry] = reference_digest(source, families[name], Path(temporary), outtype)
            print(entry, digests[entry])
    DIGESTS.write_text(json.dumps(digests, indent=2, sort_keys=True) + "\n")


def reference_digest(source: Path, family: str, temporary: Path, outtype: str) -> dict[str, Any]:
    from bigdl.llm import llm_convert

    checkpoint, output = temporary / "checkpoint", temporary / "output"
    shutil.copytree(source, checkpoint)
    output.mkdir()
    config_path = checkpoint / "config.json"
    config = json.loads(config_path.read_text())
    rotary = (config.get("rope_parameters") or {}).get("partial_rotary_factor")
    if rotary is not None:
        config["rotary_pct"] = rotary
    config_path.write_text(json.dumps(config))
    if family == "llama":
        write_pickle(checkpoint, config)
    else:
        tokenizer_config = checkpoint / "tokenizer_config.json"
        values = json.loads(tokenizer_config.read_text())
        tokenizer_config.write_text(json.dumps(values | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    binary = llm_convert(str(checkpoint), str(output), model_format="pth", model_family=family, outtype=outtype)
    content = Path(binary).read_bytes()
    return {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "source_sha256": hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest(),
    }


def write_pickle(checkpoint: Path, config: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import load_file

    weights = load_file(checkpoint / "model.safetensors")
    if config.get("tie_word_embeddings"):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    heads, shared = config["num_attention_heads"], config.get("num_key_value_heads")
    if shared:
        for name in [name for name in weights if name.endswith(("k_proj.weight", "v_proj.weight"))]:
            by_head = weights[name].reshape(shared, -1, config["hidden_size"])
            weights[name] = by_head.repeat_interleave(heads // shared, 0).reshape(-1, config["hidden_size"])
        config["num_key_value_heads"] = heads
        (checkpoint / "config.json").write_text(json.dumps(config))
    torch.save(weights, checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()


if __name__ == "__main__":
    main()
