"""A queue that shares a model between flows: start-time fair queueing (Goyal, Vin and Cheng, 1996) over tokens.

Each flow has a tag, the tokens that it has been served. The next item is the first one of the flow with the lowest tag,
so an item of any size has its turn, and no quantum has to be chosen as in deficit round robin. A flow is charged with
an estimate when its item starts and with what the item really took when it ends, as the virtual token counter of
"Fairness in Serving Large Language Models" (OSDI 2024) is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

FlowName = str | None  # the name of an API key; None where there are no keys


class Item(Protocol):
    """What is queued. `work`: estimated tokens, at least 1."""

    @property
    def flow(self) -> FlowName: ...

    @property
    def work(self) -> int: ...


I = TypeVar("I", bound=Item)  # noqa: E741 - the one type of this module


class Flow(Generic[I]):
    def __init__(self) -> None:
        self.tag = 0
        self.waiting: deque[I] = deque()
        self.work = 0  # of `waiting`
        self.running = 0


class FairQueue(Generic[I]):
    """Items wait (`push`), start (`pop`, or `start` without waiting) and end (`end`)."""

    def __init__(self) -> None:
        self._flows: dict[FlowName, Flow[I]] = {}
        self._virtual_time = 0  # the tag of the flow whose item started last
        self._count = self._running = self.work = 0

    def __len__(self) -> int:
        """Items that wait; `work` is their estimated tokens."""
        return self._count

    def __iter__(self) -> Iterator[I]:
        for flow in self._flows.values():
            yield from flow.waiting

    def push(self, item: I) -> None:
        flow = self._flow(item.flow)
        flow.waiting.append(item)
        self._add(flow, item, 1)

    def pop(self) -> I:
        """Starts the next item. Raises ValueError where none waits."""
        flow = min((flow for flow in self._flows.values() if flow.waiting), key=lambda flow: flow.tag)
        item = flow.waiting.popleft()
        self._add(flow, item, -1)
        self._charge(flow, item)
        return item

    def start(self, item: I) -> None:
        """Without waiting."""
        self._charge(self._flow(item.flow), item)

    def remove(self, item: I) -> None:
        """An item that waits no longer. Raises ValueError where it does not wait."""
        flow = self._flows[item.flow]
        flow.waiting.remove(item)
        self._add(flow, item, -1)
        self._forget()

    def end(self, item: I, tokens: int) -> None:
        """An item that was started has taken so many tokens."""
        flow = self._flows[item.flow]
        flow.tag += tokens - item.work
        flow.running -= 1
        self._running -= 1
        self._forget()

    def queued(self, name: FlowName) -> int:
        """Estimated tokens of a flow's items that wait."""
        flow = self._flows.get(name)
        return flow.work if flow is not None else 0

    def work_ahead(self, name: FlowName) -> float:
        """Estimated tokens of the items that will start before a further one of this flow. At least those of the items
        that would if no more came. If the others go on asking, it is what starts while the flow keeps the share that it
        has of what runs, a number that jumps. The mean of the two is near what is then seen."""
        flow = self._flows.get(name)
        if flow is None:
            return 0.0
        tag = flow.work + max(self._virtual_time, flow.tag)
        others = (each for each in self._flows.values() if each is not flow)
        waiting = flow.work + sum(min(each.work, max(0, tag - each.tag)) for each in others)
        share = flow.running / self._running if flow.running else 1.0
        return (waiting + max(waiting, flow.work / share)) / 2

    def by_length(self) -> list[tuple[int, list[I]]]:
        """The queued work and the waiting items of each flow, the longest first."""
        flows = sorted(self._flows.values(), key=lambda flow: -flow.work)
        return [(flow.work, list(flow.waiting)) for flow in flows if flow.waiting]

    def check_integrity(self) -> None:
        flows = self._flows.values()
        assert self._count == sum(len(flow.waiting) for flow in flows)
        assert self.work == sum(item.work for item in self)
        assert self._running == sum(flow.running for flow in flows)
        assert all(flow.work == sum(item.work for item in flow.waiting) for flow in flows)
        assert all(item.flow == name for name, flow in self._flows.items() for item in flow.waiting)
        assert self._count or self._running or not self._flows

    def _flow(self, name: FlowName) -> Flow[I]:
        """One without work begins where the others are: time in which it asked for nothing earns it nothing."""
        flow = self._flows.setdefault(name, Flow())
        if not flow.waiting:
            flow.tag = max(flow.tag, self._virtual_time)
        return flow

    def _charge(self, flow: Flow[I], item: I) -> None:
        self._virtual_time = max(self._virtual_time, flow.tag)
        flow.tag += item.work
        flow.running += 1
        self._running += 1

    def _add(self, flow: Flow[I], item: I, sign: int) -> None:
        flow.work += sign * item.work
        self.work += sign * item.work
        self._count += sign

    def _forget(self) -> None:
        """Where nothing waits or runs there is nothing to share."""
        if not self._count and not self._running:
            self._flows.clear()
            self._virtual_time = 0
