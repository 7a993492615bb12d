from __future__ import annotations

import re
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster.cli import app
from cluster.commands.keys import add_key, list_keys, remove_key
from cluster.config import AuthConfig
from cluster.errors import ConfigError
from deployments.api.access import Access, hash_of, load_keys

RUNNER = CliRunner()

BY_HAND = f"""\
# who may ask
  # the first
  - name: alice   # in Rome
    sha256: {hash_of("a")}
    max_concurrent: 3
  # the second
  - {{name: bob, sha256: {hash_of("b")}}}
  # that is all"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def names(file: Path) -> list[str]:
    return [entry.name for entry in load_keys(file)]


def test_a_new_key_opens_and_is_kept_nowhere(file: Path) -> None:
    key = add_key(file, "alice", 4, None)
    assert re.fullmatch(r"nbl-[A-Za-z0-9_-]{43}", key)
    assert key not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    assert Access(AuthConfig(api_keys_file=file)).identify(key).enter().key == "alice"
    (entry,) = load_keys(file)
    assert (entry.max_concurrent, entry.tokens_per_minute) == (4, None)


def test_no_two_keys_are_the_same(file: Path) -> None:
    keys = {add_key(file, name, None, 100) for name in ("alice", "bob", "carol")}
    assert len(keys) == 3
    assert names(file) == ["alice", "bob", "carol"]
    assert [path.name for path in file.parent.iterdir()] == ["keys.yaml"]


@pytest.mark.parametrize("name", ["on", "1e3", "123", "a@b.c"])
def test_a_name_that_means_something_in_yaml_stays_a_name(file: Path, name: str) -> None:
    add_key(file, name, None, None)
    assert names(file) == [name]


@pytest.mark.parametrize("name", ["", "a b", "-a", "a\nb", "nbl-abc", "a" * 64])
def test_a_wrong_name_is_refused(file: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="name: found"):
        add_key(file, name, None, None)
    assert not file.exists()


def test_a_taken_name_is_refused(file: Path) -> None:
    add_key(file, "alice", None, None)
    before = file.read_text()
    with pytest.raises(ConfigError, match="alice has a key already"):
        add_key(file, "alice", None, None)
    assert file.read_text() == before


def test_what_people_wrote_stays(file: Path) -> None:
    file.write_text(BY_HAND)
    file.chmod(0o640)
    add_key(file, "carol", None, 5)
    assert file.read_text().startswith(BY_HAND + "\n  - name:")
    assert names(file) == ["alice", "bob", "carol"]
    assert file.stat().st_mode & 0o777 == 0o640
    remove_key(file, "alice")
    remove_key(file, "carol")
    assert file.read_text().splitlines() == [
        "# who may ask",
        "  # the first",
        "  # the second",
        f"  - {{name: bob, sha256: {hash_of('b')}}}",
        "  # that is all",
    ]


def test_comments_around_a_removed_entry_stay_and_those_in_it_go(file: Path) -> None:
    file.write_text(
        f"""\
---
# of all
- name: alice
  sha256: {hash_of("a")}
# of bob
- {{name: bob, sha256: {hash_of("b")}}}
# of carol

- name: carol # from Rome
  # inside
  sha256: '{hash_of("c")}'
  tokens_per_minute: null # no limit
# the end
"""
    )
    remove_key(file, "bob")
    remove_key(file, "carol")
    alice = ["---", "# of all", "- name: alice", f"  sha256: {hash_of('a')}"]
    assert file.read_text().splitlines() == [*alice, "# of bob", "# of carol", "", "# the end"]
    add_key(file, "dave", None, None)
    assert file.read_text().splitlines()[: len(alice) + 5] == [
        *alice,
        "# of bob",
        "# of carol",
        "",
        "# the end",
        '- name: "dave"',
    ]


def test_a_file_of_which_a_comment_would_be_lost_is_left_as_it_is(file: Path) -> None:
    # ruamel.yaml forgets the comment before an entry in braces that has one in its own line.
    text = f"- {{name: alice, sha256: {hash_of('a')}}}\n# lost\n- {{name: bob, sha256: {hash_of('b')}}} # from Rome\n"
    file.write_text(text)
    with pytest.raises(ConfigError, match="laid out"):
        add_key(file, "carol", None, None)
    assert file.read_text() == text


def test_the_last_key_can_go_and_another_come(file: Path) -> None:
    file.write_text("# mine\n")
    with pytest.raises(ConfigError, match="holds \\[\\]"):
        add_key(file, "alice", None, None)
    file.write_text("# mine\n[]\n")
    add_key(file, "alice", None, None)
    remove_key(file, "alice")
    assert file.read_text() == "# mine\n[]\n"
    add_key(file, "bob", None, None)
    assert names(file) == ["bob"]
    assert file.read_text().startswith("# mine\n")


@pytest.mark.parametrize(
    "text",
    [
        f"[{{name: alice, sha256: {hash_of('a')}}}, {{name: carol, sha256: {hash_of('c')}}}]\n",
        f"-\n  name: alice\n  sha256: {hash_of('a')}\n- {{name: carol, sha256: {hash_of('c')}}}\n...\n",
    ],
)
def test_a_file_in_another_form_is_left_as_it_is(file: Path, text: str) -> None:
    file.write_text(text)
    for change in (lambda: add_key(file, "bob", None, None), lambda: remove_key(file, "alice")):
        with pytest.raises(ConfigError):
            change()
        assert file.read_text() == text
    assert len(list(file.parent.iterdir())) == 1


def test_a_link_stays_a_link(file: Path, tmp_path: Path) -> None:
    add_key(tmp_path / "real.yaml", "alice", None, None)
    file.symlink_to(tmp_path / "real.yaml")
    add_key(file, "bob", None, None)
    assert file.is_symlink()
    assert names(tmp_path / "real.yaml") == ["alice", "bob"]


def test_a_key_that_is_not_there_cannot_be_removed(file: Path) -> None:
    add_key(file, "alice", None, None)
    with pytest.raises(ConfigError, match="no key of the name bob"):
        remove_key(file, "bob")
    with pytest.raises(ConfigError, match="cannot be read"):
        remove_key(file.with_name("other.yaml"), "bob")


def test_a_folder_that_is_not_there_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be edited"):
        add_key(tmp_path / "no" / "keys.yaml", "alice", None, None)


def test_the_list_shows_limits_and_no_hash(file: Path) -> None:
    file.write_text(BY_HAND)
    console = Console(record=True, width=100)
    list_keys(file, console)
    shown = console.export_text()
    assert re.search(r"alice\W+3\W+no limit", shown)
    assert re.search(r"bob\W+no limit\W+no limit", shown)
    assert hash_of("a")[:16] not in shown


def test_the_command_prints_the_key_alone_on_stdout(file: Path) -> None:
    result = RUNNER.invoke(app, ["keys", "add", str(file), "alice", "--max-concurrent", "2"])
    assert result.exit_code == 0
    key = result.stdout.removesuffix("\n")
    assert [entry.sha256 for entry in load_keys(file)] == [hash_of(key)]
    assert "cannot be shown again" in result.stderr
    assert key not in result.stderr
    assert "alice" in RUNNER.invoke(app, ["keys", "list", str(file)]).stdout
    assert RUNNER.invoke(app, ["keys", "remove", str(file), "alice"]).exit_code == 0
    assert names(file) == []
    assert RUNNER.invoke(app, ["keys", "add", str(file), "a", "--max-concurrent", "0"]).exit_code == 2
