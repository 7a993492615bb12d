"""What the tests of the look-alike print: an event, what became of the requests meanwhile, and how long it took."""

from __future__ import annotations

from collections.abc import Iterable

from tests.chaos.load import Counts

HEAD = f"{'event':<46}  sent right failed  lost ready s"


class ClusterTable:
    """Printed by pytest with -s, and where a test fails. `failed`: the client was told at once, before or after the
    first token, by an error or by a connection that broke; `lost`: all else, a wrong text too."""

    def __init__(self) -> None:
        print(f"\n{HEAD}")

    def row(self, event: str, counts: Counts, seconds: float) -> None:
        failed, lost = counts.refused + counts.ended + counts.closed, counts.wrong + counts.lost
        cells = f"{counts.sent:>5} {counts.right:>5} {failed:>6} {lost:>5} {seconds:>7.1f}"
        print(f"{event:<46} {cells}  {dict(counts.details) or ''}", flush=True)


def summed(counts: Iterable[Counts]) -> Counts:
    """Of all models together."""
    total = Counts()
    for each in counts:
        for kind in ("sent", "right", "refused", "ended", "closed", "wrong", "lost"):
            setattr(total, kind, getattr(total, kind) + getattr(each, kind))
        total.details += each.details
    return total
