from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import AuthConfig
from cluster.errors import ConfigError, RateLimitError, UnauthenticatedError
from deployments.api import access as access_module
from deployments.api.access import Access, KeyEntry, bearer_key, hash_of


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def entry(name: str, max_concurrent: int | None = None, tokens_per_minute: int | None = None) -> dict[str, object]:
    """Whose key is `key-NAME`."""
    limits = {"max_concurrent": max_concurrent, "tokens_per_minute": tokens_per_minute}
    return {"name": name, "sha256": hash_of(f"key-{name}")} | limits


def write(file: Path, *entries: dict[str, object]) -> None:
    file.write_text(yaml.safe_dump(list(entries)))


@pytest.fixture
def opened(tmp_path: Path, clock: Clock) -> Callable[..., Access]:
    def open_(*entries: dict[str, object]) -> Access:
        write(tmp_path / "keys.yaml", *entries)
        return Access(AuthConfig(api_keys_file=tmp_path / "keys.yaml"), clock)

    return open_


def test_without_a_file_everyone_is_admitted_without_limits() -> None:
    access = Access(AuthConfig())
    for presented in (None, "", "whatever"):
        for _ in range(100):
            admission = access.identify(presented).enter()
            admission.spend(10**9)
            assert admission.key is None


def test_each_key_is_known_by_its_name(opened: Callable[..., Access]) -> None:
    access = opened(entry("a"), entry("b"), entry("c"))
    assert [access.identify(f"key-{name}").enter().key for name in "abc"] == ["a", "b", "c"]


@pytest.mark.parametrize("presented", [None, "", "key-", "key-b", "key-a ", "KEY-A", hash_of("key-a"), "é\ud800"])
def test_without_a_right_key_nobody_is_admitted(opened: Callable[..., Access], presented: str | None) -> None:
    with pytest.raises(UnauthenticatedError) as error:
        opened(entry("a")).identify(presented).enter()
    assert "Authorization: Bearer KEY" in str(error.value)
    assert not presented or presented not in str(error.value)


def test_a_file_without_keys_admits_nobody(opened: Callable[..., Access]) -> None:
    with pytest.raises(UnauthenticatedError):
        opened().identify("key-a").enter()


def test_a_key_is_compared_with_every_entry(opened: Callable[..., Access], monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []

    def compare(known: str, presented: str) -> bool:
        compared.append(known)
        return known == presented

    access = opened(entry("a"), entry("b"), entry("c"))
    monkeypatch.setattr(access_module.hmac, "compare_digest", compare)
    assert access.identify("key-a").enter().key == "a"
    assert compared == [hash_of(f"key-{name}") for name in "abc"]


def test_only_so_many_requests_at_once(opened: Callable[..., Access]) -> None:
    access = opened(entry("a", max_concurrent=2), entry("b", max_concurrent=1))
    first, _ = access.identify("key-a").enter(), access.identify("key-a").enter()
    with pytest.raises(RateLimitError, match="max_concurrent is 2") as error:
        access.identify("key-a").enter()
    assert error.value.retry_after_s == 1
    access.identify("key-b").enter()  # has its own
    first.leave()
    first.leave()  # counts once
    access.identify("key-a").enter()
    with pytest.raises(RateLimitError):
        access.identify("key-a").enter()


def test_tokens_are_paid_for_afterwards(opened: Callable[..., Access], clock: Clock) -> None:
    access = opened(entry("a", tokens_per_minute=60))
    admission = access.identify("key-a").enter()
    admission.spend(59)
    access.identify("key-a").enter()  # one token is left
    admission.spend(11)  # 10 below zero
    with pytest.raises(RateLimitError, match="60 tokens a minute") as error:
        access.identify("key-a").enter()
    assert error.value.retry_after_s == 11
    clock.now += 10  # just empty
    with pytest.raises(RateLimitError) as error:
        access.identify("key-a").enter()
    assert error.value.retry_after_s == 1
    clock.now += 1
    access.identify("key-a").enter()


def test_the_bucket_holds_one_minute_s_tokens_at_most(opened: Callable[..., Access], clock: Clock) -> None:
    access = opened(entry("a", tokens_per_minute=60))
    clock.now += 3600
    access.identify("key-a").enter().spend(60)
    with pytest.raises(RateLimitError):
        access.identify("key-a").enter()


def test_a_refused_request_takes_no_place(opened: Callable[..., Access], clock: Clock) -> None:
    access = opened(entry("a", max_concurrent=1, tokens_per_minute=60))
    admission = access.identify("key-a").enter()
    admission.spend(61)
    admission.leave()
    for _ in range(3):
        with pytest.raises(RateLimitError, match="tokens a minute"):
            access.identify("key-a").enter()
    clock.now += 2
    access.identify("key-a").enter()


@given(
    capacity=st.integers(1, 10**6),
    events=st.lists(st.tuples(st.floats(0, 120), st.integers(0, 10**6)), max_size=20),
)
def test_whoever_waits_as_long_as_told_is_admitted_and_not_much_earlier(
    capacity: int, events: list[tuple[float, int]]
) -> None:
    clock = Clock()
    holder = access_module.Holder(KeyEntry(name="a", sha256="0" * 64, tokens_per_minute=capacity), clock)
    started, spent = clock.now, 0
    for seconds, tokens in events:
        clock.now += seconds
        try:
            holder.enter()
        except RateLimitError as error:
            before = clock.now
            clock.now = before + error.retry_after_s - 1.001
            if clock.now > before:
                with pytest.raises(RateLimitError):
                    holder.enter()
            clock.now = before + error.retry_after_s
            holder.enter()
        # No more than a full bucket and what flowed in, before what this request takes itself.
        assert spent <= capacity * (1 + (clock.now - started) / 60) + 1e-3
        holder.spend(tokens)
        spent += tokens


def test_a_changed_file_is_taken_up_a_second_later(opened: Callable[..., Access], clock: Clock, tmp_path: Path) -> None:
    access = opened(entry("a"), entry("b"))
    write(tmp_path / "keys.yaml", entry("b"), entry("c"))
    clock.now += 0.5
    access.identify("key-a").enter()
    clock.now += 0.5
    with pytest.raises(UnauthenticatedError):
        access.identify("key-a").enter()
    assert [access.identify(f"key-{name}").enter().key for name in "bc"] == ["b", "c"]


def test_the_file_is_looked_at_once_a_second(
    opened: Callable[..., Access], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = opened(entry("a"))
    looks: list[Path] = []
    stamp_of = access_module.stamp_of
    monkeypatch.setattr(access_module, "stamp_of", lambda file: (looks.append(file), stamp_of(file))[1])
    monkeypatch.setattr(access_module, "load_keys", lambda file: pytest.fail("an unchanged file is not read"))
    for _ in range(40):
        clock.now += 0.125
        access.identify("key-a").enter()
    assert len(looks) == 5


def test_what_a_key_owes_and_has_under_way_outlives_a_change(
    opened: Callable[..., Access], clock: Clock, tmp_path: Path
) -> None:
    access = opened(entry("a", max_concurrent=1), entry("b", tokens_per_minute=60))
    running = access.identify("key-a").enter()
    access.identify("key-b").enter().spend(120)
    write(tmp_path / "keys.yaml", entry("c"), entry("b", tokens_per_minute=90), entry("a", max_concurrent=1))
    clock.now += 1
    with pytest.raises(RateLimitError, match="max_concurrent"):
        access.identify("key-a").enter()
    with pytest.raises(RateLimitError) as error:
        access.identify("key-b").enter()
    assert error.value.retry_after_s == 20  # 29 tokens, at 90 a minute
    running.leave()
    access.identify("key-a").enter()


def test_limits_can_be_set_and_lifted_while_running(
    opened: Callable[..., Access], clock: Clock, tmp_path: Path
) -> None:
    access = opened(entry("a"))
    access.identify("key-a").enter().spend(10**6)  # was free
    write(tmp_path / "keys.yaml", entry("a", tokens_per_minute=60))
    clock.now += 1
    access.identify("key-a").enter().spend(100)
    with pytest.raises(RateLimitError):
        access.identify("key-a").enter()
    write(tmp_path / "keys.yaml", entry("a"))
    clock.now += 1
    access.identify("key-a").enter()


@pytest.fixture
def serve_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """Serve's logger hands nothing on once Serve was imported."""
    monkeypatch.setattr(logging.getLogger("ray.serve"), "handlers", [caplog.handler])
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", False)
    return caplog


@pytest.mark.parametrize("broken", ["", "- {name: b", "- {name: b}", None])
def test_a_file_that_broke_keeps_the_keys_before_and_is_logged_once(
    opened: Callable[..., Access], clock: Clock, tmp_path: Path, serve_log: pytest.LogCaptureFixture, broken: str | None
) -> None:
    file = tmp_path / "keys.yaml"
    access = opened(entry("a"))
    if broken is None:
        file.unlink()
    else:
        file.write_text(broken)
    for _ in range(3):
        clock.now += 1
        assert access.identify("key-a").enter().key == "a"
        with pytest.raises(UnauthenticatedError):
            access.identify("key-b").enter()
    (record,) = serve_log.records
    assert record.levelno == logging.ERROR
    assert str(file) in record.getMessage()
    write(file, entry("b"))
    clock.now += 1
    assert access.identify("key-b").enter().key == "b"
    with pytest.raises(UnauthenticatedError):
        access.identify("key-a").enter()
    file.unlink()
    clock.now += 1
    access.identify("key-b").enter()
    assert len(serve_log.records) == 2


def test_a_file_put_in_the_old_one_s_place_is_noticed(
    opened: Callable[..., Access], clock: Clock, tmp_path: Path
) -> None:
    access = opened(entry("a"))
    before = (tmp_path / "keys.yaml").stat()
    write(tmp_path / "new.yaml", entry("b"))
    os.utime(tmp_path / "new.yaml", ns=(before.st_atime_ns, before.st_mtime_ns))
    (tmp_path / "new.yaml").replace(tmp_path / "keys.yaml")
    clock.now += 1
    assert access.identify("key-b").enter().key == "b"


def test_a_file_that_comes_and_goes_is_logged_each_time(
    clock: Clock, tmp_path: Path, serve_log: pytest.LogCaptureFixture
) -> None:
    folder, elsewhere = tmp_path / "keys", tmp_path / "elsewhere"
    folder.mkdir()
    write(folder / "keys.yaml", entry("a"))
    access = Access(AuthConfig(api_keys_file=folder / "keys.yaml"), clock)
    for times in (1, 2):
        folder.rename(elsewhere)
        clock.now += 1
        access.identify("key-a").enter()
        assert len(serve_log.records) == times
        elsewhere.rename(folder)
        clock.now += 1
        access.identify("key-a").enter()


def test_a_missing_file_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"keys\.yaml: cannot be read"):
        Access(AuthConfig(api_keys_file=tmp_path / "keys.yaml"))


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ("Bearer abc", "abc"),
        ("bearer  abc ", "abc"),
        ("Bearer", None),
        ("Bearer ", None),
        ("Basic abc", None),
        ("abc", None),
        ("", None),
        (None, None),
    ],
)
def test_the_key_of_a_header(header: str | None, key: str | None) -> None:
    assert bearer_key(header) == key


def test_what_is_left_of_a_keys_tokens(opened: Callable[..., Access], clock: Clock) -> None:
    access = opened(entry("a", tokens_per_minute=60), entry("b", max_concurrent=1))
    a = access.identify("key-a")
    assert access.identify("key-b").budget() == {}

    def left() -> tuple[str, ...]:
        budget = a.budget()
        return tuple(budget[f"x-ratelimit-{name}-tokens"] for name in ("limit", "remaining", "reset"))

    assert left() == ("60", "60", "0s")
    a.spend(25)
    assert left() == ("60", "35", "25s")
    a.spend(45)
    assert left() == ("60", "0", "70s")
    clock.now += 30.5
    assert left() == ("60", "20", "40s")
