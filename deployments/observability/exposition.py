"""The text that a scrape gets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.exposition import ALLOWUTF8


class Families:
    """As prometheus_client takes them, in the place of a registry."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def exposition(families: Sequence[Metric], accept: str | None) -> tuple[bytes, str]:
    """The content and its media type, which a client's header Accept chooses: Prometheus' text format or OpenMetrics.
    Each family must be there once (`merged`)."""
    encode, media_type = choose_encoder(accept or "")
    # Where prometheus_client 0.26 escapes names, it makes an underscore of the colon in an OpenMetrics sample's name,
    # but not in its family's. No name here needs escaping: each is valid in every version of the formats.
    return encode(Families(families), escaping=ALLOWUTF8), media_type  # type: ignore[call-arg]  # not in its type
