"""The training texts in `text/`, cut into documents."""

from __future__ import annotations

import random
from pathlib import Path

TEXT = Path(__file__).parent / "text"


def questions_and_answers() -> list[tuple[list[str], str]]:
    """The blocks of qa.txt: one or more questions and the answer that they share."""
    pairs = []
    for block in (TEXT / "qa.txt").read_text("utf-8").strip().split("\n\n"):
        lines = block.splitlines()
        pairs.append(([line[3:] for line in lines[:-1]], lines[-1][3:]))
    return pairs


def paragraphs(name: str) -> list[str]:
    """Whole blocks of code.txt or paragraphs.txt; a method stays with its class."""
    blocks: list[str] = []
    for block in (TEXT / name).read_text("utf-8").strip().split("\n\n"):
        if block.startswith(" "):
            blocks[-1] += "\n\n" + block
        else:
            blocks.append(block)
    return blocks


def rephrased(question: str, rng: random.Random) -> str:
    """The question as it stands, mostly; else one of the ways in which people ask the same."""
    if rng.random() < 0.7:
        return question
    return rng.choice([question.removesuffix("?"), question.lower(), question.replace("What is", "What's", 1)])


def documents(texts: str, rng: random.Random) -> list[str]:
    """One shuffled epoch. Some documents go on with another question or function, as prompts with a history do."""
    if texts == "code":
        pieces, whole, separator = paragraphs("code.txt"), [], "\n\n\n"
    else:
        pieces = [f"Q: {rephrased(q, rng)} A: {answer}" for qs, answer in questions_and_answers() for q in qs]
        whole, separator = paragraphs("paragraphs.txt"), "\n"
    rng.shuffle(pieces)
    epoch = list(whole)
    while pieces:
        document = pieces.pop()
        if rng.random() < 0.1:  # people also ask without the form
            document = document.removeprefix("Q: ")
        while pieces and rng.random() < 0.25:
            document += separator + pieces.pop()
        epoch.append(document)
    rng.shuffle(epoch)
    return epoch


def corpus(texts: str) -> list[str]:
    if texts == "code":
        return paragraphs("code.txt")
    return [f"Q: {q} A: {a}" for qs, a in questions_and_answers() for q in qs] + paragraphs("paragraphs.txt")
