"""Ids and text against sentencepiece itself on the same tokenizer.model."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from cluster.checkpoints.tokenizer.files import end_tokens, load_tokenizer
from cluster.errors import CheckpointError
from deployments.generation.text import IncrementalDetokenizer, Tokenizer
from deployments.records import Grammar
from tests.conftest import DEMOS
from tests.examples import examples
from tests.random_tokenizer import MISTRAL_WORDS, sentencepiece_model, tokenizer_files

LINES = [
    "hello world the cat sat on the mat",
    "tea  time \uff46\uff55\uff4c\uff4c \ufb01ne caf\u00e9",
    "a 12 \u65e5",
] * 20
IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
# What a model is trained with; without IDENTITY it has sentencepiece's nmt_nfkc and its precompiled character map.
MODELS: dict[str, dict[str, Any]] = {
    "llama": IDENTITY,
    "nfkc": {},
    "no first space": IDENTITY | {"add_dummy_prefix": False},
    "nfkc without a first space": {"add_dummy_prefix": False},
    "space at the end": {"treat_whitespace_as_suffix": True},
    "symbols of the user": IDENTITY | {"user_defined_symbols": ["<u>", "hell"]},
    "no byte tokens": IDENTITY | {"byte_fallback": False},
    "unigram": IDENTITY | {"model_type": "unigram"},
    "nfkc unigram": {"model_type": "unigram", "byte_fallback": False},
}
WORDS = [
    *"helo wrdtca \n\t\u2581\u00e9\uff46\ufb01\u65e5\u3000",
    "hello",
    "<u>",
    " the",
    "<0x20>",
    "e\u0301",
    "\U0001f600",
]
TEXTS = st.lists(
    st.sampled_from(WORDS) | st.characters(exclude_categories=["Cs"]).map(str), max_size=12
).map("".join)  # fmt: skip
DECAPODA = {"bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LLaMATokenizer"}


def trained(**options: Any) -> bytes:
    model, usual = io.BytesIO(), {"model_type": "bpe", "byte_fallback": True, "vocab_size": 400}
    SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, hard_vocab_limit=False, minloglevel=2, **(usual | options)
    )
    return model.getvalue()


def folder_with(folder: Path, model: bytes, **files: Any) -> Path:
    (folder / "tokenizer.model").write_bytes(model)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.generated
@pytest.mark.parametrize("name", [*MODELS, "demo"])
def test_ids_and_text_are_those_of_sentencepiece(name: str, tmp_path: Path) -> None:
    model = (DEMOS / "llama" / "tokenizer.model").read_bytes() if name == "demo" else trained(**MODELS[name])
    tokenizer, library = Tokenizer(folder_with(tmp_path, model)), SentencePieceProcessor(model_proto=model)

    @settings(max_examples=examples(60, 500), deadline=None)
    @given(TEXTS, st.lists(st.integers(0, library.vocab_size() - 1), max_size=10))
    def check(text: str, any_ids: list[int]) -> None:
        ids = library.encode(text)
        assert tokenizer.encode(text) == (1, *ids)
        assert tokenizer.encode(text, add_special_tokens=False) == tuple(ids)
        assert tokenizer.decode(ids) == library.decode(ids)
        expected = library.decode(any_ids)
        if "\ufffd" not in expected:  # of an invalid run of byte tokens nibble keeps the valid characters
            assert tokenizer.decode(any_ids) == expected
        stream = IncrementalDetokenizer(tokenizer)
        assert "".join(stream.add([token]) for token in any_ids) + stream.end() == tokenizer.decode(any_ids)

    check()


def test_a_folder_like_decapodas_llama_works(tmp_path: Path) -> None:
    """Empty names, with which transformers recurses without end; and its configurations' ids are one too low."""
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    model = (DEMOS / "llama" / "tokenizer.model").read_bytes()
    files = {"tokenizer_config": DECAPODA, "special_tokens_map": {}, "config": ids, "generation_config": ids}
    folder = folder_with(tmp_path, model, **files)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.names == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert tokenizer.encode("What is CPU?", add_special_tokens=True)[0] == 1
    assert tokenizer.eos_id == 2
    assert end_tokens(folder, tokenizer) == {1, 2}
    assert Tokenizer(folder).decode([1, *tokenizer.encode(" CPU", add_special_tokens=False), 2]) == " CPU"


@pytest.mark.parametrize(
    ("config", "ids"),
    [
        ({}, [1, 288]),
        ({"add_bos_token": None}, [1, 288]),
        ({"add_bos_token": False}, [288]),
        ({"add_eos_token": True}, [1, 288, 2]),
        ({"bos_token": "</s>"}, [2, 288]),
        ({"bos_token": None, "eos_token": {"content": "<s>"}, "add_eos_token": True}, [1, 288, 1]),
        ({"bos_token": "<nowhere>"}, [1, 288]),
    ],
)
def test_bos_and_eos_are_added_as_tokenizer_config_says(config: dict[str, Any], ids: list[int], tmp_path: Path) -> None:
    folder = folder_with(tmp_path, sentencepiece_model(312, MISTRAL_WORDS), tokenizer_config=config)
    tokenizer = load_tokenizer(folder)
    word = next(token for text, token in tokenizer.vocabulary().items() if text == "\u2581t")
    assert tokenizer.encode("t", add_special_tokens=True) == [word if token == 288 else token for token in ids]
    assert tokenizer.encode("t", add_special_tokens=False) == [word]


def test_added_tokens_are_found_first_and_have_their_own_text(tmp_path: Path) -> None:
    """By added_tokens.json, or by added_tokens_decoder, which may also give a piece another name."""
    model = sentencepiece_model(312, MISTRAL_WORDS)
    added = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|user|>": 312, "<|user|>s": 313}
    tokenizer = Tokenizer(folder_with(tmp_path, model, added_tokens=added))
    plain = SentencePieceProcessor(model_proto=model)
    ids = tokenizer.encode("tea <|user|>s <|user|>x</s>", add_special_tokens=False)
    assert list(ids) == [*plain.encode("tea "), 313, *plain.encode(" "), 312, *plain.encode("x"), 2]
    assert tokenizer.decode([312, 313, 1, 2, 400]) == "<|user|><|user|>s"
    entries = {
        "5": {"content": "[INST]", "special": True, "lstrip": True, "rstrip": True},
        "320": {"content": "cat", "special": False, "single_word": True},
    }
    tokenizer = Tokenizer(folder_with(tmp_path, model, tokenizer_config={"added_tokens_decoder": entries}))
    ids = tokenizer.encode("tea  [INST] \ncat scat", add_special_tokens=False)
    assert list(ids) == [*plain.encode("tea"), 5, 320, *plain.encode(" scat")]
    assert tokenizer.decode([5, 320]) == "cat"


@pytest.mark.parametrize(
    ("config", "first", "rest"),
    [({}, True, True), ({"legacy": True}, True, True), ({"legacy": False}, True, False),
     ({"add_prefix_space": False}, False, False)],
)  # fmt: skip
def test_a_space_comes_before_a_text_and_what_follows_a_special_token(
    config: dict[str, bool], first: bool, rest: bool, tmp_path: Path
) -> None:
    folder = folder_with(tmp_path, sentencepiece_model(312, MISTRAL_WORDS), tokenizer_config=config)
    tokenizer = Tokenizer(folder)
    bare, spaced = (tokenizer._files.token_id(text) for text in ("t", "\u2581t"))
    assert tokenizer.encode("t</s>t", False) == (spaced if first else bare, 2, spaced if rest else bare)
    assert tokenizer.decode(tokenizer.encode("tea")) == "tea"


@pytest.mark.parametrize("name", ["llama", "nfkc", "unigram"])
@pytest.mark.parametrize("text", ["hello  the", " \ufb01ne caf\u00e9\n", "\u3000x \u0416"])
def test_a_grammar_is_followed_to_the_letter(name: str, text: str, tmp_path: Path) -> None:
    """Also one whose text sentencepiece would change."""
    tokenizer = Tokenizer(folder_with(tmp_path, trained(**MODELS[name])))
    mask = tokenizer.mask(Grammar("grammar", f"start: {json.dumps(text, ensure_ascii=False)}", "grammar"))
    written = b""
    for _ in range(40):
        logits = np.zeros(400, np.float32)
        mask.apply(logits)
        allowed = np.flatnonzero(np.isfinite(logits)).tolist()
        if set(allowed) == tokenizer.eos_ids:
            break
        mask.accept(allowed[-1])
        written += tokenizer.token_bytes(allowed[-1])
    assert written.decode() == text


def test_tokenizer_json_goes_before_tokenizer_model(tmp_path: Path) -> None:
    shutil.copyfile(DEMOS / "llama" / "tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_files("qwen2", 330)["tokenizer.json"]))
    assert Tokenizer(tmp_path).encode("ab") == (97, 98)


def test_a_damaged_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: not a sentencepiece model: download it again"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.model and no tokenizer\.json; one of them is needed"):
        load_tokenizer(tmp_path)
