"""GPT-2's byte-level alphabet, in which tokenizers spell the bytes of a piece as printable characters."""

from __future__ import annotations


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
