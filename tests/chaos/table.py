"""What the chaos tests print: what was done, and what became of the requests meanwhile."""

from __future__ import annotations

from tests.chaos.load import Counts

HEAD = f"{'what was done':<44}  sent right refused ended closed wrong  lost  gap s"


class Table:
    """Printed by pytest with -s, and where a test fails."""

    def __init__(self) -> None:
        print(f"\n{HEAD}")

    def row(self, what: str, counts: Counts, gap_s: float) -> None:
        """`gap_s`: the longest time from one right answer to the next."""
        numbers = (counts.right, counts.refused, counts.ended, counts.closed, counts.wrong, counts.lost)
        cells = " ".join(f"{number:>{width}}" for number, width in zip(numbers, (5, 7, 5, 6, 5, 5), strict=True))
        print(f"{what:<44} {counts.sent:>5} {cells} {gap_s:>6.1f}  {dict(counts.details) or ''}", flush=True)
