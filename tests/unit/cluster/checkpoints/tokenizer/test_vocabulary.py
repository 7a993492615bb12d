from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.artifacts.ggml import VocabToken, pack_head
from cluster.checkpoints.tokenizer.vocabulary import read_vocabulary
from cluster.errors import CheckpointError
from cluster.families import FAMILIES, FamilyName
from tests.random_tokenizer import (
    MISTRAL_WORDS,
    SPECIALS,
    TokenizerKind,
    byte_level_tokenizer,
    sentencepiece_model,
    special_token,
    tokenizer_files,
)

DEMO = Path(__file__).parents[5] / "cluster" / "demos" / "llama"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(262))
    return tmp_path


@pytest.fixture
def byte_level(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_level_tokenizer(260)))
    return tmp_path


def test_llama_pieces_with_scores(llama: Path) -> None:
    tokens = read_vocabulary(llama, "llama", 262)
    assert tokens[:3] == [
        VocabToken(" \u2047 ".encode(), 0.0),
        VocabToken(b"", 0.0),
        VocabToken(b"", 0.0),
    ]
    assert tokens[3 + 0xE9] == VocabToken(b"\xe9", 0.0)
    assert tokens[260:] == [VocabToken(" w1\u00e9".encode(), -1.5), VocabToken(" w2\u00e9".encode(), -3.0)]


def test_llama_added_tokens_follow_in_the_order_of_their_ids(llama: Path) -> None:
    (llama / "added_tokens.json").write_text(json.dumps({"b": 263, "a": 262}))
    assert read_vocabulary(llama, "llama", 264)[262:] == [
        VocabToken(b"a", -1000.0),
        VocabToken(b"b", -1000.0),
    ]


def test_llama_added_tokens_are_left_out_where_the_model_has_no_room_for_them(llama: Path) -> None:
    (llama / "added_tokens.json").write_text(json.dumps({"[PAD]": 262}))
    assert len(read_vocabulary(llama, "llama", 262)) == 262


def test_llama_added_tokens_may_name_pieces_of_the_model_once_more(llama: Path) -> None:
    (llama / "added_tokens.json").write_text(json.dumps({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 262}))
    assert read_vocabulary(llama, "llama", 263)[262:] == [VocabToken(b"a", -1000.0)]


@pytest.mark.parametrize("added", ['{"a": 300}', '{"a": "262"}', '{"a": 262, "b": 262}', '{"a": 1, "b": 262}'])
def test_llama_added_tokens_with_other_ids_are_refused(added: str, llama: Path) -> None:
    (llama / "added_tokens.json").write_text(added)
    with pytest.raises(CheckpointError, match=r"added_tokens\.json: found ids? "):
        read_vocabulary(llama, "llama", 263)


def test_llama_with_more_tokens_than_embeddings_is_refused(llama: Path) -> None:
    with pytest.raises(CheckpointError, match=r"vocab_size 261.* hold 262 tokens"):
        read_vocabulary(llama, "llama", 261)


def test_llama_with_more_embeddings_than_tokens_is_padded_as_transformers_runs_it(llama: Path) -> None:
    (llama / "added_tokens.json").write_text(json.dumps({"a": 262}))
    assert read_vocabulary(llama, "llama", 265)[262:] == [
        VocabToken(b"a", -1000.0),
        *[VocabToken(b"", -1000.0)] * 2,
    ]
    config = {"added_tokens_decoder": {"262": {"content": "a"}, "264": {"content": "c"}}}
    (llama / "tokenizer_config.json").write_text(json.dumps(config))
    assert [token.text for token in read_vocabulary(llama, "llama", 266)[262:]] == [b"a", b"", b"c", b""]


def test_llama_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.model and no tokenizer\.json"):
        read_vocabulary(tmp_path, "llama", 260)


def packed(tokens: list[VocabToken]) -> bytes:
    return pack_head(FAMILIES["llama"].container, [], tokens)


def tokenizer_json_of(model: Path, folder: Path) -> dict[str, Any]:
    """What transformers makes of a tokenizer.model, in `folder`."""
    from transformers import LlamaTokenizer

    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "tokenizer.model").unlink(missing_ok=True)
    return json.loads((folder / "tokenizer.json").read_text())


def test_llama_with_tokenizer_json_alone_is_as_with_tokenizer_model(tmp_path: Path) -> None:
    tokenizer_json_of(DEMO / "tokenizer.model", tmp_path / "fast")
    assert packed(read_vocabulary(tmp_path / "fast", "llama", 512)) == packed(read_vocabulary(DEMO, "llama", 512))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("byte_fallback", [True, False])
def test_a_trained_tokenizer_json_is_as_its_tokenizer_model(kind: str, byte_fallback: bool, tmp_path: Path) -> None:
    import sentencepiece

    model = tmp_path / "trained.model"
    with model.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(Path(__file__).read_text().splitlines() + ["\u00e9\u4f60\u597d"] * 3),
            model_writer=file,
            vocab_size=400,
            model_type=kind,
            byte_fallback=byte_fallback,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    slow, fast = tmp_path / "slow", tmp_path / "fast"
    slow.mkdir()
    (slow / "tokenizer.model").write_bytes(model.read_bytes())
    size = sentencepiece.SentencePieceProcessor(model_file=str(model)).vocab_size()
    (tmp_path / "fast").mkdir()
    (fast / "tokenizer.json").write_text(json.dumps(fast_form(model, kind)))
    assert packed(read_vocabulary(fast, "llama", size)) == packed(read_vocabulary(slow, "llama", size))


def fast_form(model: Path, kind: str) -> dict[str, Any]:
    """tokenizer.json of a sentencepiece model, with what the vocabulary is read from."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    spelled = [pieces.id_to_piece(i) for i in range(pieces.vocab_size())]
    model_state: dict[str, Any] = {
        "type": "Unigram",
        "vocab": [[piece, pieces.get_score(i)] for i, piece in enumerate(spelled)],
        "unk_id": 0,
    }
    if kind == "bpe":
        model_state = {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(spelled)}, "merges": []}
    return {
        "added_tokens": [special_token(i, spelled[i]) for i in range(3)],
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}]},
        "model": model_state,
    }


def test_tokens_added_to_tokenizer_json_come_as_from_added_tokens_json(tmp_path: Path) -> None:
    values = tokenizer_json_of(DEMO / "tokenizer.model", tmp_path / "fast")
    values["added_tokens"] += [
        special_token(512, "<|user|>") | {"special": False},
        special_token(513, "[PAD]"),
    ]
    (tmp_path / "fast" / "tokenizer.json").write_text(json.dumps(values))
    tokens = read_vocabulary(tmp_path / "fast", "llama", 515)
    assert tokens[512:] == [
        VocabToken(b"<|user|>", -1000.0),
        VocabToken(b"[PAD]", -1000.0),
        VocabToken(b"", -1000.0),
    ]
    assert len(read_vocabulary(tmp_path / "fast", "llama", 512)) == 512  # no room: left out, as with tokenizer.model
    with pytest.raises(CheckpointError, match=r"vocab_size 513, found ids up to 513"):
        read_vocabulary(tmp_path / "fast", "llama", 513)
    with pytest.raises(CheckpointError, match=r"vocab_size 511, found ids up to 513"):
        read_vocabulary(tmp_path / "fast", "llama", 511)
    (tmp_path / "fast" / "tokenizer.json").write_text(json.dumps(values | {"added_tokens": []}))
    with pytest.raises(CheckpointError, match=r"vocab_size 511, found ids up to 511"):
        read_vocabulary(tmp_path / "fast", "llama", 511)


def test_llama_with_byte_level_pieces_has_their_bytes(byte_level: Path) -> None:
    tokens = read_vocabulary(byte_level, "llama", 262)
    assert tokens[0] == VocabToken(b"", 0.0)  # <|endoftext|>
    assert sorted(token.text for token in tokens[1:257]) == [bytes([byte]) for byte in range(256)]
    assert [token.score for token in tokens[1:4]] == [0.0, -1.0, -2.0]
    assert tokens[260:] == [VocabToken(b"", -1000.0)] * 2


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"model": 1, "added_tokens": []}',
        '{"model": {"type": "WordPiece", "vocab": {}}, "added_tokens": []}',
        '{"model": {"type": "BPE", "vocab": [1]}, "added_tokens": []}',
        '{"model": {"type": "BPE", "vocab": {"a": "b"}}, "added_tokens": []}',
        '{"model": {"type": "Unigram", "vocab": {"a": 1}}, "added_tokens": []}',
        '{"model": {"type": "BPE", "vocab": {}}, "added_tokens": [1]}',
        '{"model": {"type": "BPE", "vocab": {}}, "added_tokens": {"a": 1}}',
        '{"model": {"type": "BPE", "vocab": {"\\ud800": 0}}, "added_tokens": []}',
    ],
)
def test_llama_with_a_damaged_tokenizer_json_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: (not a tokenizer|found a JSON)"):
        read_vocabulary(tmp_path, "llama", 262)


def test_a_damaged_tokenizer_model_is_refused(llama: Path) -> None:
    (llama / "tokenizer.model").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: not a sentencepiece model"):
        read_vocabulary(llama, "llama", 262)


def test_a_tokenizer_model_that_does_not_fit_gives_way_to_tokenizer_json(llama: Path) -> None:
    """Llama 3's is tiktoken's; and a fine-tuned Mistral may have its new tokens in tokenizer.json alone."""
    files = tokenizer_files("mistral", 286)
    files["tokenizer.json"]["added_tokens"].append(special_token(286, "<|im_start|>"))
    (llama / "tokenizer.json").write_text(json.dumps(files["tokenizer.json"]))
    expected = read_vocabulary(llama, "llama", 288)
    assert expected[286:] == [VocabToken(b"<|im_start|>", -1000.0), VocabToken(b"", -1000.0)]
    (llama / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    assert read_vocabulary(llama, "llama", 288) == expected
    (llama / "tokenizer.model").write_bytes(sentencepiece_model(286, MISTRAL_WORDS))
    assert read_vocabulary(llama, "llama", 286) == list(_scored(expected[:286]))


def _scored(tokens: list[VocabToken]) -> Iterator[VocabToken]:
    """With the scores of the sentencepiece model, which has them at will; tokenizer.json has none."""
    for i, token in enumerate(tokens):
        yield token._replace(score=-1.5 * max(0, i - 259))


@pytest.mark.parametrize("kind", ["llama3", "qwen2"])
def test_a_byte_level_tokenizer_with_added_tokens_may_have_fewer_tokens_than_the_model(
    kind: TokenizerKind, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_files(kind, 300)["tokenizer.json"]))
    tokens = read_vocabulary(tmp_path, "llama", 384)
    specials = SPECIALS[kind]
    first = 300 - len(specials)
    assert [token.text for token in tokens[:256]] == [bytes([byte]) for byte in range(256)]
    assert tokens[256].text == b"\x00a"
    assert [token.score for token in tokens[:first]] == [-float(i) for i in range(first)]
    assert tokens[first:] == [VocabToken(text.encode(), -1000.0) for text in specials] + [VocabToken(b"", -1000.0)] * 84


@pytest.mark.parametrize("family", ["gptneox", "bloom", "starcoder"])
def test_a_missing_or_damaged_tokenizer_json_is_refused(family: FamilyName, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        read_vocabulary(tmp_path, family, 260)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        read_vocabulary(tmp_path, family, 260)


def test_gptneox_keeps_byte_level_spelling_and_leaves_unknown_ids_empty(byte_level: Path) -> None:
    tokens = read_vocabulary(byte_level, "gptneox", 262)
    assert tokens[0] == VocabToken(b"<|endoftext|>")
    assert "\u0120".encode() in [token.text for token in tokens]  # a space
    assert tokens[260:] == [VocabToken(b""), VocabToken(b"")]


def test_bloom_decodes_each_id_alone(byte_level: Path) -> None:
    texts = [token.text for token in read_vocabulary(byte_level, "bloom", 261)]
    assert texts[0] == b"<|endoftext|>"
    assert b" " in texts
    assert "\ufffd".encode() in texts  # a byte that is only part of a character
    assert texts[260] == b""


def test_starcoder_writes_raw_bytes_and_repeats_the_last_token(byte_level: Path) -> None:
    texts = [token.text for token in read_vocabulary(byte_level, "starcoder", 262)]
    assert sorted(texts[1:257]) == [bytes([byte]) for byte in range(256)]
    assert texts[259] == texts[260] == texts[261]


def test_starcoder_added_tokens_that_are_not_byte_level_are_their_text(byte_level: Path) -> None:
    tokenizer = byte_level_tokenizer(260)
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 261, "content": "two words"})
    (byte_level / "tokenizer.json").write_text(json.dumps(tokenizer))
    texts = [token.text for token in read_vocabulary(byte_level, "starcoder", 262)]
    assert texts[260:] in ([b"", b"two words"], [b"two words", b"two words"])


def test_starcoder_with_more_tokens_than_embeddings_is_refused(byte_level: Path) -> None:
    with pytest.raises(CheckpointError, match=r"vocab_size 259, tokenizer\.json ids up to 259"):
        read_vocabulary(byte_level, "starcoder", 259)
