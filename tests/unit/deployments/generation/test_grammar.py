from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import InvalidRequestError
from cluster.families import FAMILY_NAMES, FamilyName
from deployments.engines.base import TokenMask
from deployments.generation.text import Tokenizer
from deployments.records import Grammar
from tests.conftest import DEMOS
from tests.random_tokenizer import sentencepiece_tokenizer

TOKENIZERS = {family: Tokenizer(DEMOS / family) for family in FAMILY_NAMES}
VOCAB_SIZE = 530  # of a model that is padded beyond its tokenizer's 512
PATIENCE = 50  # tokens after which the random model begins to come to an end
MAX_TOKENS = 600
CLOSING = {b'"': 60.0, b"}": 50.0, b"]": 50.0}

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "mood": {"enum": ["gut", "très bien", "元気", 'a "quote"', None]},
        "age": {"type": "integer", "minimum": 17, "maximum": 120},
        "home": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}, "own": {"type": "boolean"}},
            "required": ["zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "mood", "home"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "größe": {"type": "number", "exclusiveMinimum": -2.5, "maximum": 40},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": ["größe"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "any object": {"type": "object"},
    "person": PERSON,
    "tree": TREE,
    "array": {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"const": "ß"}]}, "minItems": 2, "maxItems": 5},
    "map": {"type": "object", "additionalProperties": {"type": ["number", "null"]}, "minProperties": 1},
    "string": {"type": "string"},
    "exclusive bounds": {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5},
    "property and pattern": {
        "type": "object",
        "properties": {"score": {"type": "integer", "minimum": 0, "maximum": 50}},
        "required": ["score"],
        "additionalProperties": False,
        "patternProperties": {"^score$": {"type": "integer"}},
    },
    "with options": {"type": "object", "x-guidance": {"whitespace_flexible": True, "lenient": True}},
}


def schema_of(schema: object) -> Grammar:
    return Grammar("json_schema", json.dumps(schema), "response_format")


def rules(text: str) -> Grammar:
    return Grammar("grammar", text, "grammar")


def allowed_by(mask: TokenMask) -> list[int]:
    logits = np.zeros(VOCAB_SIZE, np.float32)
    mask.apply(logits)
    assert set(np.unique(logits)) <= {0.0, -np.inf}
    return [int(token) for token in np.flatnonzero(logits == 0)]


def write(tokenizer: Tokenizer, grammar: Grammar, seed: int) -> list[int]:
    """What a model without a thought of its own writes under the grammar until it ends the text."""
    mask, random, ids = tokenizer.mask(grammar), np.random.default_rng(seed), []
    bonus = np.zeros(VOCAB_SIZE, np.float32)
    for token in range(VOCAB_SIZE):
        bonus[token] = 100.0 if token in tokenizer.eos_ids else CLOSING.get(tokenizer.token_bytes(token), 0.0)
    for step in range(MAX_TOKENS):
        logits = random.standard_normal(VOCAB_SIZE).astype(np.float32) + (bonus if step > PATIENCE else 0)
        mask.apply(logits)
        token = int(logits.argmax())
        assert np.isfinite(logits[token])
        mask.accept(token)
        if token in tokenizer.eos_ids:
            assert set(allowed_by(mask)) == tokenizer.eos_ids
            return ids
        assert tokenizer.token_bytes(token)
        ids.append(token)
    raise AssertionError(f"no end in sight: {tokenizer.decode(ids)!r}")


def written(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of the new tokens after visible text: a sentencepiece space at the beginning stays."""
    return b"".join(map(tokenizer.token_bytes, ids)).decode()


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("name", SCHEMAS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_what_is_written_is_json_of_the_schema(family: FamilyName, name: str, seed: int) -> None:
    tokenizer = TOKENIZERS[family]
    ids = write(tokenizer, schema_of(SCHEMAS[name]), seed)
    for text in (tokenizer.decode(ids), written(tokenizer, ids)):
        assert "\ufffd" not in text
        value = json.loads(text)
        jsonschema.Draft202012Validator(SCHEMAS[name]).validate(value)
        # No white space without end, whatever options the schema brings.
        assert not re.search(r"\s\s|[\n\r\t]", re.sub(r'"(\\.|[^"\\])*"', "", text))


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("text", ['{"a": 1, "b": [true, "é"]}', '{"a":1,"b":[true,"é"]}', ' {"b": {}}'])
def test_json_may_be_written_as_people_do(family: FamilyName, text: str) -> None:
    tokenizer = TOKENIZERS[family]
    mask, rest = tokenizer.mask(schema_of({"type": "object", "properties": {"a": {}, "b": {}}})), text.encode()
    while rest:
        fitting = [token for token in allowed_by(mask) if rest.startswith(tokenizer.token_bytes(token))]
        assert fitting, rest
        token = max(fitting, key=lambda token: len(tokenizer.token_bytes(token)))
        mask.accept(token)
        rest = rest[len(tokenizer.token_bytes(token)) :]
    assert set(allowed_by(mask)) == tokenizer.eos_ids


WORDS = st.lists(
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=6), min_size=1, max_size=4
)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FAMILY_NAMES), WORDS, st.integers(0, 2**32))
def test_at_each_token_a_word_goes_on_and_the_end_comes_after_a_whole_one(
    family: FamilyName, words: list[str], seed: int
) -> None:
    tokenizer, spelled = TOKENIZERS[family], [word.encode() for word in words]
    mask = tokenizer.mask(rules("start: " + " | ".join(json.dumps(word, ensure_ascii=False) for word in words)))
    random, text = np.random.default_rng(seed), b""
    while True:
        allowed = allowed_by(mask)
        assert (set(allowed) >= tokenizer.eos_ids) == (text in spelled)
        visible = [token for token in allowed if token not in tokenizer.eos_ids]
        assert all(tokenizer.token_bytes(token) for token in visible)
        assert all(any(w.startswith(text + tokenizer.token_bytes(token)) for w in spelled) for token in visible)
        token = int(random.choice(allowed))
        if token in tokenizer.eos_ids:
            return
        mask.accept(token)
        text += tokenizer.token_bytes(token)


GRAMMARS = {
    "Lark": ('start: WORD (", " WORD)~1..3 "."\nWORD: /[a-zäöü]{2,4}/', r"[a-zäöü]{2,4}(, [a-zäöü]{2,4}){1,3}\."),
    "Lark recursion": ('start: "(" start ")" | "x"', r"\(*x\)*"),
    "Lark regex": ("start: /(0|[1-9][0-9]{0,3})€/", r"(0|[1-9][0-9]{0,3})€"),
    "GBNF": ('root ::= item ("," item)* # list\nitem ::= [a-c]+ | "\\u00e9" | "\\U0001F600" | [^\\x00-\\x7f]', None),
}


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("name", GRAMMARS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_what_is_written_follows_a_grammar(family: FamilyName, name: str, seed: int) -> None:
    grammar, pattern = GRAMMARS[name]
    text = written(TOKENIZERS[family], write(TOKENIZERS[family], rules(grammar), seed))
    assert re.fullmatch(pattern or r"([a-c]+|[^\x00-\x7f])(,([a-c]+|[^\x00-\x7f]))*", text)
    if name == "Lark recursion":
        assert text.count("(") == text.count(")")


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_way_through_a_grammar_is_open(family: FamilyName) -> None:
    tokenizer = TOKENIZERS[family]
    found = {written(tokenizer, write(tokenizer, rules('start: "yes" | "no" | "é"'), seed)) for seed in range(40)}
    assert found == {"yes", "no", "é"}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_padding_and_special_tokens_are_never_allowed(family: FamilyName) -> None:
    tokenizer = TOKENIZERS[family]
    anything = allowed_by(tokenizer.mask(rules("start: /(.|\\n)+/")))
    assert len(anything) > 350
    assert max(anything) < 512
    assert all(map(tokenizer.token_bytes, anything))


def test_each_of_a_models_end_tokens_may_end_a_text(tmp_path: Path) -> None:
    """Also one that the tokenizer does not know, and never within a text."""
    folder = tmp_path / "bloom"
    shutil.copytree(DEMOS / "bloom", folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3, 515]}))
    tokenizer = Tokenizer(folder)
    mask = tokenizer.mask(rules('start: "a" "b"?'))
    a, b = (next(t for t in range(512) if tokenizer.token_bytes(t) == text) for text in (b"a", b"b"))
    assert not set(allowed_by(mask)) & {2, 3, 515}
    mask.accept(a)
    assert set(allowed_by(mask)) == {b, 2, 3, 515}
    mask.accept(515)
    assert set(allowed_by(mask)) == {2, 3, 515}


def test_a_model_without_end_token_is_refused() -> None:
    tokenizer = Tokenizer(DEMOS / "bloom")
    tokenizer.eos_ids = frozenset()
    with pytest.raises(InvalidRequestError, match="this model has no end token"):
        tokenizer.mask(rules('start: "a"'))


def test_a_tokenizer_that_llguidance_does_not_know_is_refused(tmp_path: Path) -> None:
    """Sentencepiece without byte tokens, as nibble itself can decode it."""
    state = sentencepiece_tokenizer(312)
    state["decoder"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(InvalidRequestError, match="this model's tokenizer cannot follow grammars") as e:
        Tokenizer(tmp_path).mask(rules('start: "a"'))
    assert e.value.field == "grammar"


def test_logits_may_be_shorter_than_the_tokenizers_vocabulary() -> None:
    mask = TOKENIZERS["bloom"].mask(rules("start: /[a-z]+/"))
    logits = np.zeros(300, np.float32)
    mask.apply(logits)
    assert np.isfinite(logits).any()


def test_two_requests_with_one_grammar_have_a_state_each() -> None:
    tokenizer = TOKENIZERS["bloom"]
    first, second = tokenizer.mask(rules('start: "ab"')), tokenizer.mask(rules('start: "ab"'))
    before = allowed_by(second)
    first.accept(before[0])
    assert allowed_by(second) == before != allowed_by(first)
    assert allowed_by(tokenizer.mask(rules('start: "ab"'))) == before
