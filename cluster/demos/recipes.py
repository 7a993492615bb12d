"""What each demo checkpoint is: its shape, tokenizer, texts and training schedule.

Shapes bow to bigdl-llm's runtimes: matrix dimensions are multiples of 64 (one Q4_0 block), llama has 26 layers and
gptneox 16, as their libraries abort the process on depths that they do not know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from transformers import BloomConfig, GPTBigCodeConfig, GPTNeoXConfig, LlamaConfig, PretrainedConfig

VOCAB = 512
CONTEXT = 512


class Recipe(NamedTuple):
    config: Callable[[], PretrainedConfig]
    specials: tuple[str, ...]  # tokens 0, 1, ... of the vocabulary
    named_tokens: dict[str, str]  # of tokenizer_config.json
    steps: int
    learning_rate: float
    tokenizer: Literal["sentencepiece", "byte_level"] = "byte_level"
    texts: Literal["answers", "code"] = "answers"
    template_start: str | None = ""  # of the chat template; None: the checkpoint has no template


def _llama() -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=192,  # = 8/3 of the width, rounded up by a multiple: the runtime derives it so
        num_hidden_layers=26,
        initializer_range=0.06,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )


def _gptneox() -> PretrainedConfig:
    return GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=16,
        initializer_range=0.06,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        use_parallel_residual=True,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )


def _bloom() -> PretrainedConfig:
    return BloomConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        n_layer=6,
        n_head=4,
        initializer_range=0.05,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        seq_length=CONTEXT,
    )


def _starcoder() -> PretrainedConfig:
    return GPTBigCodeConfig(
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        n_embd=128,
        n_layer=6,
        initializer_range=0.05,
        n_head=4,
        multi_query=True,
        activation_function="gelu_pytorch_tanh",
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )


_END_OF_TEXT = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}

RECIPES: dict[str, Recipe] = {
    "llama": Recipe(
        _llama,
        ("<unk>", "<s>", "</s>"),
        {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        steps=600,
        learning_rate=3e-3,
        tokenizer="sentencepiece",
        template_start="{{- bos_token -}}\n",
    ),
    "gptneox": Recipe(_gptneox, ("<|endoftext|>",), _END_OF_TEXT, steps=700, learning_rate=3e-3),
    "bloom": Recipe(
        _bloom,
        ("<unk>", "<s>", "</s>", "<pad>"),
        {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        steps=600,
        learning_rate=2.5e-3,
    ),
    "starcoder": Recipe(
        _starcoder,
        ("<|endoftext|>",),
        _END_OF_TEXT,
        steps=600,
        learning_rate=2.5e-3,
        texts="code",
        template_start=None,
    ),
}
