"""How many examples hypothesis draws: a number that `make test` has time for, and a larger one for `make test-long`."""

from __future__ import annotations

import os

LONG = os.environ.get("NIBBLE_TEST_LONG") == "1"
USUAL_EXAMPLES, LONG_EXAMPLES = 100, 500  # of a test that names no numbers of its own


def examples(usual: int, long: int) -> int:
    return long if LONG else usual
