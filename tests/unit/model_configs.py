"""A configuration of each family, as config.json has it, and what is read from it with a few fields changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.checkpoints.hyperparameters import read_hyperparameters
from cluster.families import FamilyName
from cluster.families.architecture import Hyperparameters

CONFIGS: dict[FamilyName, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
    },
    "gptneox": {
        "vocab_size": 50432,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "max_position_embeddings": 2048,
        "rotary_pct": 1.0,
        "use_parallel_residual": False,
        "hidden_act": "gelu",
    },
    "bloom": {"vocab_size": 250880, "n_embed": 4096, "num_attention_heads": 32, "n_layer": 30},
    "starcoder": {
        "vocab_size": 49280,
        "n_embd": 2048,
        "n_head": 16,
        "n_layer": 24,
        "n_positions": 2048,
        "n_inner": 8192,
        "multi_query": True,
        "activation_function": "gelu_fast",
    },
}


def read(family: FamilyName, **changes: Any) -> Hyperparameters:
    return read_hyperparameters(Path("folder"), CONFIGS[family] | changes, family)
