"""Which labels nodes lack for a model: Ray's own message of a replica that waits does not name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.nodes_config import NodesConfig

Labels = Mapping[str, str]


def unmet(nodes: NodesConfig, labels: Sequence[Labels]) -> str | None:
    """What to say where none of the nodes with these `labels`, one mapping a node, may run the model; None where one
    may."""
    selectors = [nodes.selector, *(each.selector for each in nodes.fallback)]
    if any(meets(selector, node) for selector in selectors for node in labels):
        return None
    wanted = " or ".join(", ".join(f"{key}={value}" for key, value in selector.items()) for selector in selectors)
    keys = sorted({key for selector in selectors for key in selector})
    return f"no node has the label {wanted}; {'; '.join(found(key, labels) for key in keys)}"


def found(key: str, labels: Sequence[Labels]) -> str:
    values = sorted({node[key] for node in labels if key in node})
    return f"{key} is {', '.join(values)}" if values else f"no node has a label {key}"


def meets(selector: Labels, node: Labels) -> bool:
    """Whether a node with these labels is one that Ray would take."""
    return all(meets_condition(condition, node.get(key)) for key, condition in selector.items())


def meets_condition(condition: str, value: str | None) -> bool:
    """`condition` as in Ray's label_selector: value, !value or in(value,value). A node without the label has no value,
    and so none that it must not have."""
    if condition.startswith("!"):
        return not meets_condition(condition[1:], value)
    if condition.startswith("in(") and condition.endswith(")"):
        return value in condition[len("in(") : -1].replace(" ", "").split(",")
    return value == condition
