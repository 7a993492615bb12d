"""Two routers' counting of the same keys, brought together by the board."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster.config import AuthConfig
from cluster.errors import RateLimitError
from deployments.api.access import Access, hash_of
from deployments.routing.model_admission import ModelAdmission
from deployments.shared_usage import SILENT_S, UsageBoard, take, use_of
from tests.unit.fakes import EchoModel


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Routers:
    """`tell`: what `SharedUsage` does twice a second, of one router."""

    def __init__(self, folder: Path, **limits: int) -> None:
        self.clock = Clock()
        self.file = folder / "keys.yaml"
        self.file.write_text(yaml.safe_dump([{"name": "a", "sha256": hash_of("key"), **limits}]))
        self.board = UsageBoard(self.clock)
        self.routers: dict[str, Access] = {}

    def router(self, name: str) -> Access:
        self.routers[name] = Access(AuthConfig(api_keys_file=self.file), self.clock)
        self.tell(name)
        return self.routers[name]

    def tell(self, *names: str) -> None:
        for name in names:
            take(self.routers[name], {}, self.board.tell(name, use_of(self.routers[name], {})))


def test_requests_under_way_at_one_router_count_at_the_others(tmp_path: Path) -> None:
    routers = Routers(tmp_path, max_concurrent=2)
    first, second = routers.router("1"), routers.router("2")
    admissions = [first.identify("key").enter() for _ in range(2)]
    routers.tell("1", "2")
    with pytest.raises(RateLimitError, match="2 requests are under way, max_concurrent is 2"):
        second.identify("key").enter()
    admissions[0].leave()
    routers.tell("1", "2")
    second.identify("key").enter()


def test_tokens_spent_at_one_router_are_paid_once_at_each(tmp_path: Path) -> None:
    routers = Routers(tmp_path, tokens_per_minute=600)
    first, second = routers.router("1"), routers.router("2")
    first.identify("key").enter().spend(400)
    for _ in range(3):
        routers.tell("1", "2")
    second.identify("key").enter().spend(300)
    routers.tell("2", "1")
    for router in (first, second):
        with pytest.raises(RateLimitError, match="try again in 11 s"):
            router.identify("key").enter()
    routers.clock.now += 11
    for router in (first, second):
        router.identify("key").enter()


def test_a_new_router_does_not_pay_for_what_was_spent_before_it(tmp_path: Path) -> None:
    routers = Routers(tmp_path, tokens_per_minute=600)
    first = routers.router("1")
    first.identify("key").enter().spend(500_000)
    routers.tell("1")
    second = routers.router("2")
    routers.tell("1", "2")
    second.identify("key").enter()


def test_a_board_that_was_lost_changes_nothing_of_what_is_known(tmp_path: Path) -> None:
    routers = Routers(tmp_path, tokens_per_minute=600, max_concurrent=1)
    first, second = routers.router("1"), routers.router("2")
    admission = first.identify("key").enter()
    admission.spend(500)
    routers.tell("1", "2")
    routers.board = UsageBoard(routers.clock)
    routers.tell("2", "1", "2")
    admission.leave()
    routers.tell("1", "2")
    second.identify("key").enter().spend(90)  # of 100 that are left: they were not paid for again
    routers.tell("2")
    with pytest.raises(RateLimitError, match="under way"):
        second.identify("key").enter()


def test_what_a_router_held_that_is_gone_is_free_again(tmp_path: Path) -> None:
    routers = Routers(tmp_path, max_concurrent=1)
    first, second = routers.router("1"), routers.router("2")
    first.identify("key").enter()
    routers.tell("1", "2")
    routers.clock.now += SILENT_S + 1
    routers.tell("2")
    second.identify("key").enter()


def test_a_router_has_its_part_of_the_replicas_and_what_the_others_leave() -> None:
    board, access = UsageBoard(Clock()), Access(AuthConfig())
    config = EchoModel().config  # 4 completions a replica
    one, two = ({"m": ModelAdmission(config, lambda: 2)} for _ in range(2))

    def tell() -> tuple[int, int]:
        for name, admissions in (("1", one), ("2", two), ("1", one)):
            take(access, admissions, board.tell(name, use_of(access, admissions)))
        return one["m"].capacity(), two["m"].capacity()

    for admissions in (one, two):
        admissions["m"].change(config, routers=2)
    assert (one["m"].capacity(), two["m"].capacity()) == (4, 4), "as long as nothing is known of the other"
    assert tell() == (8, 8)
    places = [one["m"].queue.enter(None, 1) for _ in range(9)]
    assert tell() == (8, 4), "its part is its own, though the other has more for a while"
    waiting = [two["m"].queue.enter(None, 1) for _ in range(5)]
    assert tell() == (4, 4)
    for place in places[:5]:
        one["m"].queue.leave(place)
    assert (one["m"].queue.running, two["m"].queue.running) == (4, 4)
    take(access, two, None)
    assert two["m"].capacity() == 4
    for place in places:
        one["m"].queue.leave(place)
    assert tell() == (4, 8)
    assert waiting[-1].started_at is not None, "at once, when it is told"


def test_the_board_has_the_load_of_each_model_at_all_routers_that_are_alive() -> None:
    clock, access = Clock(), Access(AuthConfig())
    board, admission = UsageBoard(clock), ModelAdmission(EchoModel().config, lambda: 1)  # 4 completions a replica
    for _ in range(6):
        admission.queue.enter(None, 10)
    assert board.loads() == {}
    for router in ("1", "2"):
        board.tell(router, use_of(access, {"m": admission}))
    load = board.loads()["m"]
    assert (load.running, load.queued, load.queued_tokens) == (8, 4, 40)
    clock.now += SILENT_S - 1
    board.tell("2", use_of(access, {"m": admission}))
    clock.now += 2
    assert board.loads()["m"].queued == 2, "the other router has ended"
