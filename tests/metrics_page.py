"""`python -m tests.metrics_page` (`make docs`) writes docs/reference/metrics.md from the definitions of the metrics."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from deployments.observability.definitions import (
    REPLICA_INFO,
    REPLICA_METRICS,
    ROUTER_METRICS,
    STORE_METRICS,
    Definition,
)

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "metrics.md"

ABOUT = """# Metrics

What `GET /metrics` gives: Prometheus' text format, or OpenMetrics where the client accepts it. This page is made from
`deployments/observability/definitions.py` by `make docs`.

- One scrape of any router gives the series of all routers and of all replicas, so scrape the Service (or HAProxy) as
  one target, not every pod. Who does not answer within 2 s is left out of that scrape. A scrape starts no replica and
  waits for none.
- Names that begin with `vllm:` mean what they mean in vLLM; `model_name` is a model's own name, whatever alias a client
  used. A router's counters begin at 0 when it starts, each router has series of its own: sum over `router`.
- With `auth.api_keys_file` a scrape needs a key as every request does (`Authorization: Bearer KEY`): the metrics tell
  which models there are and how busy they are, at the port that clients reach. A scrape takes nothing of the key's
  limits. vLLM asks for no key.
- Scrapes and probes are neither logged nor counted.
"""
ROUTER = "## Of each router\n"
REPLICAS = """## Of each replica

The numbers of its engine; an engine leaves out what it does not have. `vllm:num_requests_*` count requests at the
routers, these count sequences in an engine.
"""
STORE = """## Of the artifact store

One actor in the cluster; its counters begin at 0 when it starts again.
"""


def page() -> str:
    replica = [REPLICA_INFO, *REPLICA_METRICS]
    return "\n".join(
        [ABOUT, ROUTER, *table(ROUTER_METRICS), "", REPLICAS, *table(replica), "", STORE, *table(STORE_METRICS), ""]
    )


def table(definitions: Iterable[Definition]) -> list[str]:
    return ["| metric | type | labels | what |", "|---|---|---|---|", *map(row, definitions)]


def row(definition: Definition) -> str:
    labels = ", ".join(f"`{label}`" for label in definition.labels)
    return f"| `{definition.exposed}` | {definition.kind} | {labels} | {definition.help} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
