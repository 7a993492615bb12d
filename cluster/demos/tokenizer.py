"""Trains the tokenizers of the demo checkpoints: sentencepiece's or byte-level BPE."""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from cluster.demos.corpus import corpus
from cluster.demos.recipes import CONTEXT, VOCAB, Recipe

# Question and answer on one line, as the models were trained; they know no system messages.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == "user" -%}{{ "Q: " + message.content + " A:" }}
{%- elif message.role == "assistant" -%}{{ " " + message.content + "\\n" }}
{%- endif -%}
{%- endfor -%}
"""


def save_tokenizer(recipe: Recipe, folder: Path) -> None:
    """Learns the merges from the ASCII part of the texts only: all other characters then become byte tokens, so
    that a stream meets tokens that end in the middle of a character."""
    ascii_texts = [text.encode("ascii", "ignore").decode() for text in corpus(recipe.texts)]
    if recipe.tokenizer == "sentencepiece":
        _save_sentencepiece(ascii_texts, folder / "tokenizer.model")
        specific = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": True}
    else:
        _save_byte_level(ascii_texts, recipe.specials, folder / "tokenizer.json")
        specific = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config = specific | {"model_max_length": CONTEXT, "clean_up_tokenization_spaces": False}
    config |= recipe.named_tokens
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    if recipe.template_start is not None:
        (folder / "chat_template.jinja").write_text(recipe.template_start + CHAT_TEMPLATE, "utf-8")


def _save_byte_level(texts: list[str], specials: tuple[str, ...], path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[AddedToken(special, special=True) for special in specials],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def _save_sentencepiece(texts: list[str], path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # ids 0, 1, 2 are <unk>, <s>, </s> by default
        sentence_iterator=iter(line for text in texts for line in text.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
