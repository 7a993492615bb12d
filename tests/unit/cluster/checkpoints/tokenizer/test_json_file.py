"""Ids and text against the `tokenizers` library on the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from cluster.checkpoints.tokenizer.files import load_tokenizer
from cluster.errors import CheckpointError
from cluster.families import FAMILY_NAMES
from deployments.generation.text import IncrementalDetokenizer, Tokenizer
from tests.conftest import DEMOS
from tests.examples import examples
from tests.random_tokenizer import byte_level_tokenizer, sentencepiece_tokenizer, special_token, tokenizer_files

SPACE = "\u2581"
REPLACE = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
FALLBACK, FUSE, BYTE_LEVEL = {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "ByteLevel", "use_regex": False}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def sequence(kind: str, *parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", kind: list(parts)}


def metaspace(scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}


def with_metaspace(scheme: str, *, fallback: bool) -> dict[str, Any]:
    decoder = sequence("decoders", FALLBACK, metaspace(scheme)) if fallback else metaspace(scheme)
    parts = {"normalizer": None, "pre_tokenizer": metaspace(scheme), "decoder": decoder}
    return sentencepiece_tokenizer(312) | parts


LLAMA2 = sentencepiece_tokenizer(312)
LLAMA3 = tokenizer_files("llama3", 320)["tokenizer.json"]
CUT = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
FILLED = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
# tokenizer.json, and the class that tokenizer_config.json names, which must not matter.
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "llama 2": (LLAMA2, "LlamaTokenizer"),
    "llama without a first space": (
        LLAMA2
        | {
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            "decoder": sequence("decoders", REPLACE, FALLBACK, FUSE),
        },
        "LlamaTokenizer",
    ),
    "metaspace always": (with_metaspace("always", fallback=False), "LlamaTokenizerFast"),
    "metaspace first": (with_metaspace("first", fallback=True), "LlamaTokenizer"),
    "metaspace never": (with_metaspace("never", fallback=True), "LLaMATokenizer"),
    "llama 3": (LLAMA3, "PreTrainedTokenizerFast"),
    "llama with GPT-2's class": (
        LLAMA3 | {"pre_tokenizer": sequence("pretokenizers", DIGITS, BYTES)},
        "GPT2Tokenizer",
    ),
    "qwen2": (tokenizer_files("qwen2", 330)["tokenizer.json"], "Qwen2Tokenizer"),
    "gptneox": (
        byte_level_tokenizer(300) | {"pre_tokenizer": sequence("pretokenizers", DIGITS, BYTES)},
        "GPTNeoXTokenizer",
    ),
    "bloom": (byte_level_tokenizer(300), "BloomTokenizerFast"),
    "starcoder that fills and cuts": (
        byte_level_tokenizer(300) | {"truncation": CUT, "padding": FILLED | {"pad_token": "<|endoftext|>"}},
        "GPT2TokenizerFast",
    ),
}
TEXTS = st.text(
    st.sampled_from([*"etaoin shr \n\t12\u2581\u00e9\u65e5\U0001f600"]) | st.characters(exclude_categories=["Cs"]),
    max_size=20,
).flatmap(lambda text: st.sampled_from([text, f" {text}", f"{text}<s>tea", f"<|eot_id|> {text}", f"  {text} "]))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Library]]:
    """Each form, and the demos', by nibble and by the library."""
    folders = {family: DEMOS / family for family in FAMILY_NAMES if family != "llama"}
    for form, (content, name) in FORMS.items():
        folders[form] = tmp_path_factory.mktemp("tokenizer")
        (folders[form] / "tokenizer.json").write_text(json.dumps(content))
        (folders[form] / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    both = {}
    for form, folder in folders.items():
        library = Library.from_file(str(folder / "tokenizer.json"))
        library.no_padding()
        library.no_truncation()
        both[form] = Tokenizer(folder), library
    return both


@pytest.mark.generated
@pytest.mark.parametrize("form", [*FORMS, "demo gptneox", "demo bloom", "demo starcoder"])
def test_ids_and_text_are_those_of_the_file(form: str, loaded: dict[str, tuple[Tokenizer, Library]]) -> None:
    tokenizer, library = loaded[form.removeprefix("demo ")]

    @settings(max_examples=examples(60, 500), deadline=None)
    @given(TEXTS, st.lists(st.integers(0, 520), max_size=12))
    def check(text: str, any_ids: list[int]) -> None:
        for add_special_tokens in (True, False):
            ids = library.encode(text, add_special_tokens=add_special_tokens).ids
            assert tokenizer.encode(text, add_special_tokens) == tuple(ids)
            assert tokenizer.decode(ids) == library.decode(ids)
        expected = library.decode(any_ids)
        # Of an invalid run of byte tokens nibble keeps the valid characters; GPT-2's bytes are the same everywhere.
        if "\ufffd" not in expected or library.decoder.__class__.__name__ == "ByteLevel":
            assert tokenizer.decode(any_ids) == expected
        stream = IncrementalDetokenizer(tokenizer)
        assert "".join(stream.add([token]) for token in any_ids) + stream.end() == tokenizer.decode(any_ids)

    check()


def test_a_first_space_that_the_tokenizer_does_not_add_is_kept(loaded: dict[str, tuple[Tokenizer, Library]]) -> None:
    for form in FORMS:
        tokenizer, _ = loaded[form]
        # Metaspace adds no space to a text that begins with one, and its decoder takes that one away.
        expected = "tea" if form in ("metaspace always", "metaspace first") else " tea"
        assert tokenizer.decode(tokenizer.encode(" tea")) == expected
        assert tokenizer.decode(tokenizer.encode("tea")) == "tea"


@pytest.mark.parametrize(
    ("form", "text", "ids"),
    [
        ("llama 2", " tea", [1, 259, 287, 260, 262]),  # two pieces of a space; LlamaTokenizer gives one
        ("llama without a first space", " tea", [1, 287, 260, 262]),
        ("llama with GPT-2's class", "12", [315, 49, 50]),  # each digit alone
        ("gptneox", "12", [50, 51]),
    ],
)
def test_ids_that_transformers_classes_change(
    form: str, text: str, ids: list[int], loaded: dict[str, tuple[Tokenizer, Library]]
) -> None:
    assert list(loaded[form][0].encode(text)) == ids


def write(folder: Path, **changes: Any) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(byte_level_tokenizer(300) | changes))
    return folder


POST = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}], "pair": []}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}, "not a tokenizer: Token `b` out of"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "not a tokenizer: Precompiled"),
        ({"post_processor": POST | {"special_tokens": {}}}, "not a tokenizer: "),
        ({"decoder": None}, "decoder: found none, allowed are ByteLevel"),
        ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, "decoder: found WordPiece"),
        ({"decoder": FUSE}, "decoder: found Fuse"),
        ({"decoder": sequence("decoders", REPLACE, FALLBACK, STRIP)}, "decoder: found Strip, of every token"),
        ({"decoder": sequence("decoders", REPLACE, FUSE, STRIP | {"start": 2})}, "decoder: found Strip"),
        ({"decoder": sequence("decoders", BYTES, STRIP | {"stop": 1})}, "decoder: found Strip"),
    ],
)
def test_what_cannot_be_loaded_or_streamed_is_refused(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    """Also where the library panics, in Rust."""
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json: {why}"):
        load_tokenizer(write(tmp_path, **changes))


def test_a_file_that_is_cut_or_nested_without_end_is_refused(tmp_path: Path) -> None:
    for content in ('{"version": "1.0", "added', "[" * 100_000, ""):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer: .*download it again"):
            load_tokenizer(tmp_path)


def test_a_text_without_tokens_is_refused_and_other_texts_are_not(tmp_path: Path) -> None:
    unigram = {"type": "Unigram", "vocab": [["a", 0.0], [SPACE, -1.0]], "unk_id": None, "byte_fallback": False}
    tokenizer = load_tokenizer(write(tmp_path, model=unigram, pre_tokenizer=None, decoder=metaspace("never")))
    assert tokenizer.encode("aa", add_special_tokens=False)[-2:] == [0, 0]
    with pytest.raises(ValueError, match="unk_id"):
        tokenizer.encode("b", add_special_tokens=False)


def test_special_tokens_by_name_and_by_id(tmp_path: Path) -> None:
    """Of an empty or missing name the configurations' id tells, if it is a special token; null is none."""
    added = [special_token(0, "<|endoftext|>"), special_token(300, "<s>"), special_token(301, "</s>")]
    write(tmp_path, added_tokens=added)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 300, "eos_token_id": [7, 301]}))

    def named(**names: Any) -> dict[str, str]:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
        return load_tokenizer(tmp_path).names

    assert named(bos_token="", unk_token="") == {"bos_token": "<s>", "eos_token": "</s>"}
    assert named(bos_token=None, eos_token={"content": "<|endoftext|>"}) == {"eos_token": "<|endoftext|>"}
    assert load_tokenizer(tmp_path).eos_id == 0
    assert named(eos_token="<nowhere>")["eos_token"] == "<nowhere>"
    assert load_tokenizer(tmp_path).eos_id is None
