"""The text layer with the tokenizers of Llama 3, Mistral and Qwen2: their tokenizer.json, without surprises."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as RawTokenizer

from cluster.errors import EngineError, InvalidRequestError
from deployments.generation.text import IncrementalDetokenizer, Tokenizer
from deployments.records import Conversation, Grammar, Message
from tests.random_checkpoint import OPENVINO_SHAPES, write_tokenizer
from tests.random_tokenizer import SPECIALS, TokenizerKind

KINDS: tuple[TokenizerKind, ...] = ("llama3", "mistral", "qwen2")
TEXTS = ["tea time", " it's 12345 \n\n ok", "caf\u00e9 \u65e5\u672c\u8a9e \U0001f600", "a\tb\r\nc", ""]
BOS = {"llama3": (315,), "mistral": (1,), "qwen2": ()}
END = {"llama3": {316, 319}, "mistral": {2}, "qwen2": {329}}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> TokenizerKind:
    name: TokenizerKind = request.param
    return name


@pytest.fixture
def folder(kind: TokenizerKind, tmp_path: Path) -> Path:
    shape = OPENVINO_SHAPES[kind]
    ids = {name: value for name, value in shape.config if name.endswith("token_id")}
    config = {"architectures": [shape.architecture or "LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2} | ids
    model_type = {"llama3": "llama"}.get(kind, kind)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    write_tokenizer(tmp_path, shape)
    return tmp_path


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_those_of_tokenizer_json(kind: TokenizerKind, folder: Path, text: str) -> None:
    tokenizer, raw = Tokenizer(folder), RawTokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(text)
    assert ids == tuple(raw.encode(text).ids)
    assert ids[: len(BOS[kind])] == BOS[kind]
    assert tokenizer.encode(text, add_special_tokens=False) == ids[len(BOS[kind]) :]
    assert tokenizer.decode(ids) == raw.decode(list(ids)) == text
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert "".join(detokenizer.add([token]) for token in ids) + detokenizer.end() == text


def test_a_draft_model_must_have_the_same_tokens(folder: Path) -> None:
    tokenizer, state = Tokenizer(folder), json.loads((folder / "tokenizer.json").read_text())
    tokenizer.require_same_tokens(Tokenizer(folder), "draft")
    vocab = state["model"]["vocab"]
    first, second = [text for text, _ in sorted(vocab.items(), key=lambda item: item[1])][-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    state["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(EngineError, match=r"draft: found a tokenizer whose token \d+ is .*, allowed is one with"):
        tokenizer.require_same_tokens(Tokenizer(folder), "draft")


def test_a_special_token_spelled_out_is_that_token_and_has_no_text(kind: TokenizerKind, folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    special = SPECIALS[kind][-1]
    (token,) = (i for i in tokenizer.encode(f"a{special}", add_special_tokens=False) if not tokenizer.token_bytes(i))
    assert token in END[kind]
    assert tokenizer.decode([*tokenizer.encode("tea"), token]) == "tea"


def test_ids_that_pad_the_vocabulary_have_no_text(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    assert [tokenizer.token_bytes(token) for token in (330, 383)] == [b"", b""]
    assert tokenizer.decode([*tokenizer.encode("tea"), 383], vocab_size=384) == "tea"
    with pytest.raises(InvalidRequestError, match="found token id 384, allowed are 0 to 383"):
        tokenizer.decode([384], vocab_size=384)


def test_every_end_token_of_the_configurations_counts(kind: TokenizerKind, folder: Path) -> None:
    assert Tokenizer(folder).eos_ids == END[kind]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert Tokenizer(folder).eos_ids == END[kind] | {5, 7}


CHATS = {
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] hi [/INST]",
    "qwen2": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
}


def test_a_conversation_is_written_as_the_model_s_template_has_it(kind: TokenizerKind, folder: Path) -> None:
    """With one BOS, which Llama 3's and Mistral's templates write themselves."""
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode_conversation(Conversation((Message("user", "hi"),)))
    raw = RawTokenizer.from_file(str(folder / "tokenizer.json"))
    assert ids == tuple(raw.encode(CHATS[kind], add_special_tokens=False).ids)
    assert tokenizer.chat_stops() == ()
    if kind == "mistral":
        with pytest.raises(InvalidRequestError, match="only user and assistant"):
            tokenizer.encode_conversation(Conversation((Message("system", "hi"),)))


def test_a_grammar_leaves_tokens_of_text_and_ends_with_any_end_token(kind: TokenizerKind, folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    mask = tokenizer.mask(Grammar("grammar", 'start: "tea"', "grammar"))
    text = b""
    for _ in range(5):
        logits = np.zeros(384, np.float32)
        mask.apply(logits)
        allowed = np.flatnonzero(np.isfinite(logits))
        if set(allowed.tolist()) == END[kind]:
            break
        assert not END[kind] & set(allowed.tolist())
        token = int(allowed[0])
        mask.accept(token)
        text += tokenizer.token_bytes(token)
    assert text == b"tea"
