"""What Serve's controller hears of the models' load, and what it goes by while it hears nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.exceptions import RayActorError

from deployments import load_board
from deployments.load_board import LoadBoard
from deployments.scaling import ModelLoad

LOADS = {"m": ModelLoad(running=3)}


class Actor:
    """Of the routers; it answers so, one after the other, and the last answer again and again."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.loads = self

    async def remote(self) -> Any:
        await asyncio.sleep(0)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


async def heard(monkeypatch: pytest.MonkeyPatch, found: list[Actor | Exception], times: int) -> list[Any]:
    """What the board has after each of so many answers."""

    def get_actor(name: str, namespace: str) -> Actor:
        actor = found.pop(0)
        if isinstance(actor, Exception):
            raise actor
        return actor

    said, board = [], LoadBoard()
    sleep = asyncio.sleep

    async def pause(seconds: float) -> None:
        if seconds:
            said.append(board.loads)
        await sleep(0)

    monkeypatch.setattr(load_board.ray, "get_actor", get_actor)
    monkeypatch.setattr(load_board.asyncio, "sleep", pause)
    board.listen()
    task = board._task
    board.listen()
    assert board._task is task, "one is enough"
    while len(said) < times:
        await sleep(0)
    assert task is not None
    task.cancel()
    return said[:times]


async def test_the_load_is_what_was_heard_last(monkeypatch: pytest.MonkeyPatch) -> None:
    later = {"m": ModelLoad(running=4)}
    assert await heard(monkeypatch, [Actor(LOADS, later)], 3) == [LOADS, later, later]


async def test_without_the_actor_or_a_router_the_load_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    actors = [ValueError("no such actor"), Actor({}, LOADS, RayActorError()), Actor(LOADS)]
    assert await heard(monkeypatch, actors, 5) == [None, None, LOADS, None, LOADS]
