"""What is told of a configuration before anything is started."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from cluster.artifacts.manifest import MANIFEST_FILE, Manifest
from cluster.cli.options import plain_console
from cluster.commands import preflight, serve
from cluster.commands.convert import convert
from cluster.commands.preflight import (
    check_fit_together,
    check_fits_any,
    check_traces,
    plan_models,
    report,
    this_node,
    thread_notes,
)
from cluster.config import ArtifactsConfig, NibbleConfig, default_config, parse_config
from cluster.conversion.outline import Outline, read_outline
from cluster.conversion.wanted import Wanted
from cluster.errors import CheckpointError, ConfigError, HubUnavailableError
from cluster.machine.topology import ThreadRoom
from tests.conftest import DEMOS, convert_here


def config(**model: Any) -> NibbleConfig:
    given = {"name": "m", "family": "llama", "checkpoint": "builtin:llama", **model}
    return parse_config({"models": [given]}, "test")


def test_an_outline_has_the_numbers_of_the_conversion() -> None:
    outline = read_outline(Wanted(source="builtin:bloom", family="bloom", quantization="q4_0"), ArtifactsConfig())
    assert outline.bytes == outline.tensors[-1].offset + outline.tensors[-1].bytes
    assert outline.shards >= 1
    assert not outline.cached
    assert outline.model.engines == ("bigdl", "openvino")


def test_a_repository_whose_artifact_the_node_has_is_not_asked_for(tmp_path: Path) -> None:
    folder = convert_here(DEMOS / "llama", "llama", tmp_path / "artifacts" / "test")
    manifest = Manifest.read(folder).model_copy(update={"source": "org/repo", "artifact_id": "test"})
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json())
    wanted = Wanted(source="org/repo", family="llama", quantization="q4_0", engine="bigdl")
    cached = read_outline(wanted, ArtifactsConfig(cache_dir=tmp_path))
    planned = read_outline(wanted.model_copy(update={"source": "builtin:llama"}), ArtifactsConfig(cache_dir=tmp_path))
    assert cached.cached
    assert (cached.model, cached.tensors, cached.bytes) == (planned.model, planned.tensors, planned.bytes)


def test_traces_that_cannot_be_exported_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [{"name": "m", "family": "llama", "checkpoint": "builtin:llama"}]
    off, on = (
        parse_config({"models": models, "observability": {"traces": traces}}, "test") for traces in (False, True)
    )
    check_traces(on)
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    check_traces(off)
    with pytest.raises(ConfigError, match=r"observability\.traces: needs the extra otlp; pip install"):
        check_traces(on)


def test_a_model_that_fits_nowhere_is_refused_with_figures() -> None:
    planned, node = plan_models(config()), this_node()
    needed = planned[0].needs(node).total
    check_fits_any(planned, [node._replace(memory=0), node._replace(memory=needed)])
    with pytest.raises(
        ConfigError, match=r"models\[0\] \(m\): a replica needs at least .* GiB .*the node with the most has"
    ):
        check_fits_any(planned, [node._replace(memory=0), node._replace(memory=needed - 1)])


@pytest.mark.parametrize(
    ("threads", "note"),
    [
        (4, None),
        (5, "no NUMA node has more than 4 cores; more replicas with fewer threads are faster"),
        (9, r"no node has more than 8 physical cores; threads that share one \(SMT\) add little"),
        (17, r"no node has more than 16 CPUs for a replica \(its cores, or the CPU quota\); it waits for one"),
    ],
)
def test_threads_that_do_not_fit_are_told(threads: int, note: str | None) -> None:
    planned = plan_models(config(threads=threads))
    nodes = [this_node()._replace(room=room) for room in (ThreadRoom(16, 8, 4), ThreadRoom(1, 1, 1))]
    notes = thread_notes(planned, nodes)
    assert notes == [line for line in report(planned, nodes) if ".threads:" in line]
    assert len(notes) == (note is not None)
    assert note is None or re.fullmatch(rf"models\[0\]\.threads: found {threads} \(m\), but {note}", notes[0])


def test_replicas_of_one_node_share_their_files() -> None:
    (one,), (two,) = plan_models(config()), plan_models(config(replicas={"min": 2, "max": 2}))
    node = this_node()
    needs = one.needs(node)
    check_fit_together([two], node._replace(memory=needs.shared + 2 * needs.own))
    with pytest.raises(ConfigError, match=r"models: their replicas need at least .* together \(m "):
        check_fit_together([two], node._replace(memory=needs.shared + 2 * needs.own - 1))


def test_a_model_that_may_have_no_replica_needs_no_memory_until_it_has_one() -> None:
    planned, node = plan_models(config(replicas={"min": 0})), this_node()
    check_fit_together(planned, node._replace(memory=0))
    with pytest.raises(ConfigError, match="a replica needs at least"):
        check_fits_any(planned, [node._replace(memory=planned[0].needs(node).total - 1)])


def test_all_models_together_must_fit() -> None:
    planned, node = plan_models(default_config()), this_node()
    total = sum(each.needs(node).total for each in planned)
    check_fit_together(planned, node._replace(memory=total))
    with pytest.raises(ConfigError, match=r"\(llama .*, gptneox .*, bloom .*, starcoder "):
        check_fit_together(planned, node._replace(memory=total - 1))


def test_a_hub_that_cannot_be_asked_now_does_not_stop_a_start() -> None:
    def unavailable(wanted: Wanted, artifacts: ArtifactsConfig) -> Outline:
        raise HubUnavailableError("down")

    assert plan_models(config(checkpoint="org/repo"), unavailable) == []


def test_serve_refuses_before_it_starts_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: Any) -> None:
        raise AssertionError("a cluster was started")

    monkeypatch.setattr(serve, "local_cluster", started)
    small = config(engine="openvino", openvino={"kv_cache": 1000})
    with pytest.raises(ConfigError, match=r"models\[0\]\.openvino\.kv_cache: found 1000 bytes"):
        serve.serve(lambda: small, None, plain_console())
    with pytest.raises(CheckpointError, match="no built-in 'nothing'"):
        serve.serve(lambda: config(checkpoint="builtin:nothing"), None, plain_console())
    monkeypatch.setattr(serve, "this_node", lambda: this_node()._replace(memory=1 << 20))
    with pytest.raises(ConfigError, match="needs at least"):
        serve.serve(config, None, plain_console())


def test_a_dry_run_says_what_it_would_do_and_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "local_cluster", None)
    serve.serve(default_config, None, plain_console(), dry_run=True)
    said = capsys.readouterr().out
    for family in ("llama", "gptneox", "bloom", "starcoder"):
        assert f"{family}: builtin:{family}: {family} q4_0, " in said
        assert f"{family}: a replica needs at least" in said
    assert "memory free on 1 node(s): " in said


def test_a_dry_run_of_a_conversion_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(str(DEMOS / "llama"), "llama", "q4_0", tmp_path / "out", None, plain_console(), dry_run=True)
    assert "llama q4_0" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_report_names_each_artifact_of_a_model() -> None:
    draft = {"draft": {"checkpoint": "builtin:llama", "tokens": 2}}
    planned = plan_models(config(engine="openvino", openvino=draft))
    lines = report(planned, [this_node()])
    assert [line.startswith("m: builtin:llama: llama q4_0") for line in lines] == [True, True, False, False]
    assert preflight.together(planned[0], this_node()) == planned[0].needs(this_node()).total
