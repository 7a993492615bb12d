"""How tokenizers spell bytes: GPT-2's byte-level alphabet of printable characters, and sentencepiece's <0xNN>."""

from __future__ import annotations

import re

_FALLBACK = re.compile("<0x([0-9A-Fa-f]{2})>")


def byte_of_character() -> dict[str, int]:
    """The inverse of the alphabet: printable Latin-1 stands for itself, the 68 other bytes are the characters from
    U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = byte_of_character()


def raw_bytes(piece: str) -> bytes:
    """The bytes behind a piece; the UTF-8 of one (an added token) that is not spelled in the alphabet."""
    try:
        return bytes(BYTE_OF_CHARACTER[character] for character in piece)
    except KeyError:
        return piece.encode()


def fallback_byte(piece: str) -> bytes | None:
    """The byte that a piece like <0x0A> is; None for any other piece."""
    match = _FALLBACK.fullmatch(piece)
    return None if match is None else bytes([int(match[1], 16)])
