from __future__ import annotations

import pytest

from cluster.artifacts.ggml import VocabToken, data_bytes, pack_head, pack_record_header
from cluster.families import FAMILIES


def test_head_is_magic_version_integers_and_tokens_with_scores() -> None:
    head = pack_head(FAMILIES["llama"].container, [7, 8], [VocabToken(b"ab", 1.0), VocabToken(b"", -2.0)])
    assert head == (
        b"tjgg" + b"\3\0\0\0" + b"\7\0\0\0" + b"\x08\0\0\0" + b"\2\0\0\0ab\0\0\x80\x3f" + b"\0\0\0\0\0\0\0\xc0"
    )


def test_head_without_version_and_scores() -> None:
    assert pack_head(FAMILIES["bloom"].container, [1], [VocabToken(b"x")]) == b"lmgg\1\0\0\0\1\0\0\0x"


@pytest.mark.parametrize("start", [0, 1, 31, 32, 1000])
def test_data_is_aligned_after_the_record_header(start: int) -> None:
    aligned = pack_record_header(FAMILIES["llama"].container, "norm.weight", "f32", (64,), start)
    assert (start + len(aligned)) % 32 == 0
    assert len(aligned) < 12 + 4 + len("norm.weight") + 32
    packed = pack_record_header(FAMILIES["starcoder"].container, "norm.weight", "f32", (64,), start)
    assert packed == b"\1\0\0\0\x0b\0\0\0\0\0\0\0\x40\0\0\0norm.weight"


def test_dimensions_are_written_innermost_first() -> None:
    header = pack_record_header(FAMILIES["bloom"].container, "w", "q4_0", (3, 64), 0)
    assert header == b"\2\0\0\0\1\0\0\0\2\0\0\0\x40\0\0\0\3\0\0\0w"


def test_data_bytes_of_both_types() -> None:
    assert data_bytes("f32", (5,)) == 20
    assert data_bytes("q4_0", (5, 128)) == 5 * 2 * 34
    assert data_bytes("q8_0", (5, 128)) == 5 * 2 * 68
