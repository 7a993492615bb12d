"""Documents as `kubectl kustomize` renders them, by kind, namespace and name."""

from __future__ import annotations

import copy
import re
from typing import Any

Document = dict[str, Any]

FACTORS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def quantity(value: Any) -> float:
    """`500m`, `2`, `4Gi`: as a number. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(m|[kMGT]i?|)", str(value))
    if found is None:
        raise ValueError(f"quantity: found {value!r}, allowed are numbers with m, k, M, G, T, Ki, Mi, Gi or Ti")
    number, unit = found.groups()
    return float(number) / 1000 if unit == "m" else float(number) * FACTORS[unit]


class Manifests:
    """By kind, namespace and name. Documents are changed in place by tests: take a copy first."""

    def __init__(self, documents: list[Document]) -> None:
        self.documents = documents

    def copy(self) -> Manifests:
        return Manifests(copy.deepcopy(self.documents))

    def of_kind(self, kind: str) -> list[Document]:
        return [each for each in self.documents if each["kind"] == kind]

    def get(self, kind: str, name: str, namespace: str) -> Document | None:
        return next(
            (
                each
                for each in self.of_kind(kind)
                if each["metadata"]["name"] == name and each["metadata"].get("namespace", "default") == namespace
            ),
            None,
        )

    def only(self, kind: str) -> Document:
        """Raises ValueError where there is none, or several."""
        found = self.of_kind(kind)
        if len(found) != 1:
            raise ValueError(f"{kind}: found {len(found)} documents, expected 1")
        return found[0]


def matches(selector: Document | None, labels: dict[str, str]) -> bool:
    """A LabelSelector: an empty one matches all, none matches nothing."""
    if selector is None:
        return False
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    return wanted and all(matches_expression(each, labels) for each in selector.get("matchExpressions", []))


def matches_expression(expression: Document, labels: dict[str, str]) -> bool:
    value, values = labels.get(expression["key"]), expression.get("values", [])
    return {
        "In": value in values,
        "NotIn": value not in values,
        "Exists": value is not None,
        "DoesNotExist": value is None,
    }[expression["operator"]]
