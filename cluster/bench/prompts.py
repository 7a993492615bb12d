"""Prompts of which no two are equal, so that no cache of prefixes helps a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

from cluster.bench.load_records import Prompt
from cluster.errors import ConfigError

TOKEN_PROMPTS = "token ids"
WORD_PROMPTS = "words"

FIRST_ID = 3  # below it most vocabularies have unknown, begin and end
MAX_REPEATS = 1000

# Each one token, with the space before it, for most tokenizers of English.
WORDS = """
the of and to in is was for that on with as by at from his an were are which this be or had not have one has first
but they all their been who its after he two also time when up she year some other people into may more about over
then than these only can would new three most where used between made many later them so will during there no city
""".split()  # noqa: SIM905 - a list of as many literals is longer to read


def token_prompts(seed: int, length: int, vocabulary: int) -> Iterator[Prompt]:
    """Of exactly `length` ids, FIRST_ID to `vocabulary` - 1. Raises ConfigError where no new one is found any more."""
    random = Random(seed)
    return unique(tuple(random.choices(range(FIRST_ID, vocabulary), k=length)) for _ in forever())


def word_prompts(seed: int, length: int) -> Iterator[Prompt]:
    """Of `length` short words, which is about as many tokens. Raises ConfigError as token_prompts does."""
    random = Random(seed)
    return unique(" ".join(random.choices(WORDS, k=length)) for _ in forever())


def file_prompts(seed: int, file: Path) -> Iterator[Prompt]:
    """The file's lines in an order by the seed; where they are used up, again with a number before each. Raises
    ConfigError for a file that cannot be read or has no text."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompt-file: {file} cannot be read: {error}") from None
    lines = list(dict.fromkeys(line for line in text.splitlines() if line.strip()))
    if not lines:
        raise ConfigError(f"prompt-file: {file} has no text; expected one prompt a line")
    Random(seed).shuffle(lines)
    return unique(line if turn == 1 else f"({turn}) {line}" for turn in forever() for line in lines)


def forever() -> Iterator[int]:
    count = 0
    while True:
        yield (count := count + 1)


def unique(prompts: Iterator[Prompt]) -> Iterator[Prompt]:
    seen: set[Prompt] = set()
    repeats = 0
    for prompt in prompts:
        if prompt not in seen:
            seen.add(prompt)
            repeats = 0
            yield prompt
        elif (repeats := repeats + 1) == MAX_REPEATS:
            raise ConfigError(
                f"input-tokens: after {len(seen)} prompts no more that were not sent before; ask for longer ones, or a"
                " larger --vocabulary"
            )
