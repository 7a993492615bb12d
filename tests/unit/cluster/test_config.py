from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from cluster.config import NibbleConfig, default_config, load_config, parse_config
from cluster.errors import ConfigError
from cluster.model_config import ReplicasConfig

MODEL = {"name": "a", "family": "llama", "checkpoint": "builtin:llama"}
OPENVINO = MODEL | {"engine": "openvino"}


def test_defaults_serve_the_four_demos() -> None:
    config = default_config()
    assert [model.checkpoint for model in config.models] == [
        "builtin:llama",
        "builtin:gptneox",
        "builtin:bloom",
        "builtin:starcoder",
    ]
    assert config.threads == 4
    assert (config.http.host, config.http.port, config.grpc.port) == ("127.0.0.1", 8000, 9000)


def test_a_file_gives_the_same_as_its_values(tmp_path: Path) -> None:
    path = tmp_path / "nibble.yaml"
    path.write_text(
        "http: {port: 8100}\nmodels:\n- {name: a, family: bloom, checkpoint: org/repo@main, replicas: {max: 3}}\n"
    )
    config = load_config(path)
    assert config.http.port == 8100
    assert config.models[0].replicas.max == 3
    assert config.models[0].threads == 2


def test_the_last_replica_stays_as_long_as_others_do_and_half_a_minute_at_least() -> None:
    for given, delay in (
        ({}, 300),
        ({"downscale_delay_s": 5}, 30),
        ({"downscale_delay_s": 5, "downscale_to_zero_delay_s": 60}, 60),
    ):
        assert ReplicasConfig.model_validate({"min": 0, **given}).to_zero_delay_s == delay


def test_by_default_everyone_is_admitted_within_limits_and_no_prompt_is_logged() -> None:
    config = default_config()
    assert config.auth.api_keys_file is None
    assert config.limits.model_dump() == {
        "body_bytes": 1 << 20,
        "prompt_tokens": None,
        "max_tokens": None,
        "choices": 32,
        "embeddings": 2048,
        "timeout_s": 600,
        "stall_s": 60,
        "keep_alive_s": 10,
        "drain_s": None,
    }
    assert config.logging.prompts is False


def test_access_and_limits_are_set_as_people_write_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = parse_config(
        {
            "models": [MODEL],
            "auth": {"api_keys_file": "~/keys.yaml"},
            "limits": {"body_bytes": "4MiB", "timeout_s": None, "prompt_tokens": 100},
            "logging": {"prompts": True},
        },
        "nibble.yaml",
    )
    assert config.auth.api_keys_file == Path("/home/someone/keys.yaml")
    assert (config.limits.body_bytes, config.limits.timeout_s, config.limits.prompt_tokens) == (4 << 20, None, 100)
    assert config.logging.prompts is True


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"models": [MODEL], "modles": 1}, "nibble.yaml: modles: unknown key"),
        ({"models": [MODEL | {"thread": 2}]}, "models[0].thread: unknown key"),
        ({"models": []}, "models"),
        ({}, "nibble.yaml: models: missing"),
        ({"models": [{"name": "a", "family": "llama"}]}, "models[0].checkpoint: missing"),
        ({"models": [MODEL, MODEL]}, "a appears more than once"),
        ({"models": [MODEL], "http": {"port": 70000}}, "http.port: found 70000"),
        ({"models": [MODEL], "http": {"cors_origins": ["a.org"]}}, "http.cors_origins[0]: found 'a.org'"),
        ({"models": [MODEL], "http": {"cors_origins": ["https://a.org/"]}}, "http.cors_origins[0]: found"),
        ({"models": [MODEL], "http": {"port": 9000}}, "http.port and grpc.port are both 9000"),
        ({"models": [MODEL | {"family": "gpt2"}]}, "models[0].family: found 'gpt2'"),
        (
            {"models": [MODEL | {"engine": "vllm"}]},
            "models[0].engine: found 'vllm'; input should be 'bigdl' or 'openvino'",
        ),
        ({"models": [MODEL | {"threads": 0}]}, "models[0].threads: found 0"),
        ({"models": [MODEL | {"threads": "many"}]}, "models[0].threads: found 'many'"),
        ({"models": [MODEL | {"isa": "sse"}]}, "models[0].isa: found 'sse'"),
        ({"models": [MODEL | {"name": "a/b/c"}]}, "models[0].name: found 'a/b/c'"),
        ({"models": [MODEL | {"name": "a/"}]}, "models[0].name: found 'a/'"),
        ({"models": [MODEL | {"aliases": ["/b"]}]}, "models[0].aliases[0]: found '/b'"),
        ({"models": [MODEL | {"aliases": ["a"]}]}, "a appears more than once; names and aliases must differ"),
        ({"models": [MODEL, MODEL | {"name": "b", "aliases": ["a"]}]}, "a appears more than once"),
        (
            {"models": [MODEL | {"name": "o/a"}, MODEL | {"name": "o--a"}]},
            "models: o/a and o--a would both be Serve's o--a; rename one",
        ),
        ({"models": [MODEL | {"name": "router"}]}, "models[0].name: 'router' is the name of nibble's own"),
        ({"models": [MODEL], "auth": {"keys": "a"}}, "auth.keys: unknown key"),
        ({"models": [MODEL], "auth": {"api_keys_file": ""}}, "auth.api_keys_file: is empty"),
        ({"models": [MODEL], "limits": {"body_bytes": 0}}, "limits.body_bytes: found 0"),
        ({"models": [MODEL], "limits": {"body_bytes": "1 lot"}}, "limits.body_bytes: "),
        ({"models": [MODEL], "limits": {"body_bytes": None}}, "limits.body_bytes: found None"),
        ({"models": [MODEL], "limits": {"prompt_tokens": 0}}, "limits.prompt_tokens: found 0"),
        ({"models": [MODEL], "limits": {"max_tokens": 0}}, "limits.max_tokens: found 0"),
        ({"models": [MODEL], "limits": {"embeddings": 0}}, "limits.embeddings: found 0"),
        ({"models": [MODEL], "limits": {"choices": 0}}, "limits.choices: found 0"),
        ({"models": [MODEL], "limits": {"timeout_s": 0}}, "limits.timeout_s: found 0"),
        ({"models": [MODEL], "limits": {"timeout_s": float("inf")}}, "limits.timeout_s: found inf"),
        ({"models": [MODEL], "limits": {"keep_alive_s": None}}, "limits.keep_alive_s: found None"),
        ({"models": [MODEL], "logging": {"prompts": "some"}}, "logging.prompts: found 'some'"),
        (
            {"models": [OPENVINO | {"openvino": {"prompt_lookup": 4, "draft": {"checkpoint": "org/small"}}}]},
            "models[0].openvino: prompt_lookup and draft are both set",
        ),
        (
            {"models": [OPENVINO | {"openvino": {"draft": {"checkpoint": "org/small", "tokens": 0}}}]},
            "models[0].openvino.draft.tokens: found 0",
        ),
        ({"models": [MODEL | {"openvino": {"draft": {"checkpoint": "org/small"}}}]}, "options of engine openvino"),
        ({"models": [MODEL | {"replicas": {"min": 3, "max": 2}}]}, "models[0].replicas: min is 3, max is 2"),
        ({"models": [MODEL | {"replicas": {"min": -1}}]}, "models[0].replicas.min: found -1"),
        ({"models": [MODEL | {"replicas": {"min": 0, "max": 0}}]}, "models[0].replicas.max: found 0"),
        (
            {"models": [MODEL | {"replicas": {"min": 0, "downscale_to_zero_delay_s": 29}}]},
            "models[0].replicas.downscale_to_zero_delay_s: found 29; input should be greater than or equal to 30",
        ),
        (
            {"models": [MODEL | {"replicas": {"min": 1, "max": 2, "downscale_to_zero_delay_s": 60}}]},
            "models[0].replicas: downscale_to_zero_delay_s: found 60, but min is 1: it never goes to zero",
        ),
        ({"models": [MODEL | {"replicas": {"max": 2, "downscale_delay_s": 0}}]}, "downscale_delay_s: found 0;"),
        (
            {"models": [MODEL | {"replicas": {"max": 2, "target_ongoing_requests": 4}, "queue": {"max_ongoing": 4}}]},
            "replicas.target_ongoing_requests: found 4, allowed is less than the 4 that a replica holds",
        ),
    ],
)
def test_a_wrong_key_is_named_with_what_is_allowed(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(values, "nibble.yaml")
    assert message in str(error.value)
    assert "nibble.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"), [("models: [", "not valid YAML"), ("- a\n", "found list, expected a mapping")]
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "nibble.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "nibble.yaml")


def yaml_of(page: str) -> str:
    """The configuration in one of the repository's pages."""
    blocks = re.findall(r"```yaml\n(.*?)```", (Path(__file__).parents[3] / page).read_text(), re.DOTALL)
    return next(block for block in blocks if block.startswith("# nibble.yaml"))


def test_the_readme_s_configuration_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "nibble.yaml"
    path.write_text(yaml_of("README.md"))
    (model,) = load_config(path).models
    assert (model.engine, model.threads, model.replicas.max) == ("openvino", 8, 4)


def test_the_reference_s_configuration_is_accepted_and_names_every_section(tmp_path: Path) -> None:
    path = tmp_path / "nibble.yaml"
    path.write_text(yaml_of("docs/reference/configuration.md"))
    assert set(yaml.safe_load(path.read_text())) == set(NibbleConfig.model_fields)
    config = load_config(path)
    assert config.artifacts.cache_size == 50_000_000_000
    assert config.artifacts.shard_size == default_config().artifacts.shard_size
    assert config.models[0].ggml_type == "q4_0"
