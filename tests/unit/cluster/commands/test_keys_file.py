"""The file of API keys: what is refused, and that no message shows what may be a key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster.errors import ConfigError
from deployments.api.access import hash_of, load_keys, parse_keys


def entry(name: str) -> dict[str, object]:
    return {"name": name, "sha256": hash_of(f"key-{name}")}


A = entry("a")
SECRET = "nbl-" + "s" * 43


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "found no list of keys"),
        ({"a": SECRET}, "found no list of keys"),
        ([SECRET], "entry 1: "),
        ([A, {"name": "b"}], "entry 2 (b): sha256: missing"),
        ([A, entry("b") | {"max_concurrent": 0}], "entry 2 (b): max_concurrent: input should be greater than"),
        ([A, entry("b") | {"max_concurrent": True}], "entry 2 (b): max_concurrent: "),
        ([A, entry("b") | {"tokens_per_minute": SECRET}], "entry 2 (b): tokens_per_minute: "),
        ([A, entry("b") | {"rate": SECRET}], "entry 2 (b): unknown key; allowed are name, sha256"),
        ([A, entry("b") | {SECRET: 1}], "entry 2 (b): unknown key"),
        ([A, entry("b") | {"sha256": SECRET}], "entry 2 (b): sha256: expected the key's SHA-256"),
        ([A, entry("b") | {"name": SECRET}], "entry 2: name: is a key"),
        ([A, entry("b") | {"name": f"x {SECRET}"}], "entry 2: name: "),
        ([A, entry("b") | {"name": 1}], "entry 2: name: "),
        ([A, entry("b") | {"name": "a"}], "entry 2 (a): name: the same as entry 1's"),
        ([A, A | {"name": "b"}], "entry 2 (b): sha256: the same as entry 1's"),
    ],
)
def test_a_wrong_entry_is_named_and_nothing_of_it_is_shown(tmp_path: Path, values: object, message: str) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as error:
        load_keys(file)
    assert message in str(error.value)
    assert SECRET not in str(error.value)
    assert hash_of("key-a") not in str(error.value)


def test_the_line_of_wrong_yaml_is_named_but_not_shown() -> None:
    with pytest.raises(ConfigError) as error:
        parse_keys(f"- name: a\n  sha256: [{SECRET}\n", "keys.yaml")
    assert str(error.value) == "keys.yaml: not valid YAML in line 3"
    with pytest.raises(ConfigError, match=r"keys.yaml: not valid YAML"):
        parse_keys(f"- {SECRET}\x00", "keys.yaml")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid UTF-8"):
        load_keys(tmp_path / "keys.yaml")
