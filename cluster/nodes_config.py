"""Where replicas may run, by the labels of Ray's nodes: `models[].nodes` and `router.nodes`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from cluster.artifacts.manifest import Record
from cluster.machine.isa import ISA_LABEL, Isa

# The syntax of labels is that of Kubernetes, which Ray has taken over.
LABEL_NAME = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
LabelKey = Annotated[str, Field(pattern=rf"^([a-z0-9.-]{{1,253}}/)?{LABEL_NAME}$")]
LabelValue = Annotated[str, Field(pattern=rf"^!?{LABEL_NAME}$")]
LabelValues = Annotated[
    tuple[LabelValue, ...],
    Field(min_length=1),
    BeforeValidator(lambda given: (given,) if isinstance(given, str) else given),
]


class NodeLabels(Record):
    """Nodes that have these labels. `isa`: the fastest instruction set that the node can run, one of these; it is the
    label `nibble/isa`. `labels`: a value that the node must have, `!value` that it must not have, or a list of values
    of which it must have one."""

    isa: tuple[Isa, ...] = ()
    labels: dict[LabelKey, LabelValues] = Field(default_factory=dict)

    @property
    def selector(self) -> dict[str, str]:
        """As Ray's `label_selector` has it."""
        wanted: dict[str, tuple[str, ...]] = {ISA_LABEL: self.isa, **self.labels} if self.isa else self.labels
        return {key: values[0] if len(values) == 1 else f"in({','.join(values)})" for key, values in wanted.items()}

    def __hash__(self) -> int:
        return hash(self.model_dump_json())  # a model is a key of dictionaries, and a dict cannot be

    @model_validator(mode="after")
    def one_way_to_say_it(self) -> NodeLabels:
        if self.isa and ISA_LABEL in self.labels:
            raise ValueError(f"isa and labels both give {ISA_LABEL}; keep one of them")
        for key, values in self.labels.items():
            if len(values) > 1 and any(value.startswith("!") for value in values):
                raise ValueError(f"labels.{key}: found {', '.join(values)}; a value with ! must be the only one")
        return self


class NodesConfig(NodeLabels):
    """`fallback`: where no node with these labels has room, nodes with those, in this order; `{}` is any node."""

    fallback: tuple[NodeLabels, ...] = ()

    @property
    def actor_options(self) -> dict[str, Any]:
        """Of the `ray_actor_options` of a deployment."""
        options: dict[str, Any] = {"label_selector": self.selector}
        if self.fallback:
            options["fallback_strategy"] = [{"label_selector": each.selector} for each in self.fallback]
        return options

    @model_validator(mode="after")
    def not_empty(self) -> NodesConfig:
        if not self.selector:
            raise ValueError("names no label; give isa or labels, or leave nodes out")
        return self
