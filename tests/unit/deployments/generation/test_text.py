from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ArtifactError, InvalidRequestError
from cluster.families import FAMILY_NAMES, FamilyName
from deployments.generation.text import IncrementalDetokenizer, StopChecker, TextStream, Tokenizer
from tests.conftest import DEMOS
from tests.random_tokenizer import tokenizer_files

TOKENIZERS = {family: Tokenizer(DEMOS / family) for family in FAMILY_NAMES}
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
families = st.sampled_from(FAMILY_NAMES)
token_ids = st.lists(st.integers(0, 600), max_size=60)  # beyond the vocabulary of 512, too


def in_pieces(draw: st.DataObject, ids: list[int]) -> list[list[int]]:
    pieces, start = [], 0
    while start < len(ids):
        size = draw.draw(st.integers(1, 5))
        pieces.append(ids[start : start + size])
        start += size
    return pieces


def cut(text: str, stops: list[str]) -> str:
    """What a user expects of stop strings, character by character."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


@given(families, TEXTS)
def test_a_text_survives_encoding_and_decoding(family: FamilyName, text: str) -> None:
    tokenizer = TOKENIZERS[family]
    # A special token that is spelled out in a prompt is that token.
    if not any(special in text for special in ("<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>")):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.data(), families, token_ids)
def test_streamed_text_equals_unstreamed(data: st.DataObject, family: FamilyName, ids: list[int]) -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZERS[family])
    streamed = "".join(detokenizer.add(piece) for piece in in_pieces(data, ids)) + detokenizer.end()
    assert streamed == TOKENIZERS[family].decode(ids)


@given(st.data(), families, TEXTS)
def test_a_split_character_never_gives_a_replacement_character(
    data: st.DataObject, family: FamilyName, text: str
) -> None:
    ids = list(TOKENIZERS[family].encode(text.replace("\ufffd", "")))
    detokenizer = IncrementalDetokenizer(TOKENIZERS[family])
    assert all("\ufffd" not in detokenizer.add([token]) for token in ids)
    assert detokenizer.end() == ""


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_invalid_bytes_become_replacement_characters_in_the_end(family: FamilyName) -> None:
    tokenizer = TOKENIZERS[family]
    first_byte_of_two = next(token for token in range(512) if tokenizer.token_bytes(token) == b"\xc3")
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.add([first_byte_of_two]) == ""
    assert detokenizer.end() == "\ufffd"


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_special_tokens_have_no_text(family: FamilyName) -> None:
    tokenizer = TOKENIZERS[family]
    assert tokenizer.eos_ids
    assert tokenizer.decode([*tokenizer.eos_ids, 10_000]) == ""


def test_the_space_of_a_sentencepiece_word_is_kept_after_visible_text() -> None:
    tokenizer = TOKENIZERS["llama"]
    word = [token for token in tokenizer.encode("unit") if tokenizer.token_bytes(token)]
    assert tokenizer.decode(word) == "unit"
    assert IncrementalDetokenizer(tokenizer, continues=True).add(word) == " unit"


def test_a_stop_string_that_is_a_special_token_stops_at_that_token(tmp_path: Path) -> None:
    """A token without text, which no text can show; before `min_tokens` it stops nothing."""
    for name, content in tokenizer_files("qwen2", 330).items():
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = Tokenizer(tmp_path)
    stream = TextStream(tokenizer, ("<|im_start|>", "bcd"))
    assert (stream.add([97, 328], look=False), stream.stopped) == ("a", False)
    assert (stream.add([97, 98, 99, 328, 98]), stream.stopped) == ("abc", True)
    assert stream.add([98]) == stream.end() == ""


def test_a_tokenizer_tells_what_its_files_say(tmp_path: Path) -> None:
    for name, content in tokenizer_files("qwen2", 330).items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    info = Tokenizer(tmp_path).info
    assert info == {**json.loads((tmp_path / "tokenizer_config.json").read_text()), "chat_template": "{{ messages }}"}


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="character 2"):
        TOKENIZERS["bloom"].encode("ab\ud800")


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_special_tokens_are_added_unless_told_otherwise(family: FamilyName) -> None:
    tokenizer = TOKENIZERS[family]
    plain = tokenizer.encode("unit", add_special_tokens=False)
    assert all(map(tokenizer.token_bytes, plain))
    assert tokenizer.encode("unit") == ((1, *plain) if family == "llama" else plain)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_ids_outside_the_models_vocabulary_are_refused_and_those_that_pad_it_have_no_text(family: FamilyName) -> None:
    tokenizer = TOKENIZERS[family]
    ids = tokenizer.encode("unit")
    assert tokenizer.decode([*ids, 519], vocab_size=520) == "unit"
    for wrong in (-1, 520):
        with pytest.raises(InvalidRequestError, match=f"found token id {wrong}, allowed are 0 to 519") as refused:
            tokenizer.decode([*ids, wrong], vocab_size=520)
        assert refused.value.field == "tokens"


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="tokenizer"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_damaged_files_of_an_artifact_are_named(name: str, tmp_path: Path) -> None:
    shutil.copytree(DEMOS / "starcoder", tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text('{"a":' * 100_000)
    with pytest.raises(ArtifactError, match=f"{name}: not "):
        Tokenizer(tmp_path)


@given(st.data(), st.text("abc", max_size=40), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_wherever_the_pieces_end(data: st.DataObject, text: str, stops: list[str]) -> None:
    checker, given_away, start = StopChecker(stops), "", 0
    while start < len(text):
        size = data.draw(st.integers(1, 6))
        given_away += checker.add(text[start : start + size])
        assert cut(text, stops).startswith(given_away)
        start += size
    assert given_away + checker.end() == cut(text, stops)
    assert checker.stopped == any(stop in text for stop in stops)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    checker = StopChecker(["\n\nQ:"])
    assert [checker.add("Yes.\n"), checker.add("\nA"), checker.add("\n\nQ"), checker.add(":")] == [
        "Yes.",
        "\n\nA",
        "",
        "",
    ]
    assert checker.stopped
    assert checker.add("more") == checker.end() == ""


@given(st.data(), families, TEXTS, st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_token_streams_cut_at_stop_strings(
    data: st.DataObject, family: FamilyName, text: str, stops: list[str]
) -> None:
    tokenizer = TOKENIZERS[family]
    ids = list(tokenizer.encode(text))
    stream = TextStream(tokenizer, stops)
    streamed = "".join(stream.add(piece) for piece in in_pieces(data, ids)) + stream.end()
    assert streamed == cut(tokenizer.decode(ids), stops)
