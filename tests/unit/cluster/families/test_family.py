"""Every family is described completely, in its own file, and nothing else asks for a family by its name."""

from __future__ import annotations

import ast
import json
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

import cluster
import deployments
from cluster.checkpoints.hyperparameters import read_hyperparameters
from cluster.demos.recipes import RECIPES
from cluster.families import FAMILIES, FAMILY_NAMES, FamilyName
from cluster.families.architecture import Hyperparameters
from cluster.families.family import Family, VocabularyForm
from deployments.family_deployments import FAMILY_DEPLOYMENTS
from tests.conftest import DEMOS

ROOT = Path(cluster.__file__).parents[1]
FAMILY_FILES = {f"cluster/families/{name}.py": name for name in FAMILY_NAMES}
# Where a family's name is written out beyond its file, and why.
ALLOWED = {
    "cluster/families/names.py": "the type of the names, which type checkers and pydantic read",
    "deployments/family_deployments.py": "Serve names a deployment by its class: one class a family",
    "cluster/demos/recipes.py": "the demos' transformers configurations, which only training needs",
    "cluster/cli/conversion.py": "the family of `nibble pipeline` where none is given, as in the reference example",
    "deployments/generation/chat.py": "whose transcript a model of unknown family gets",
}


@cache
def source_files() -> list[tuple[str, ast.Module]]:
    packages = [Path(package.__file__).parent for package in (cluster, deployments) if package.__file__]
    assert len(packages) == 2
    paths = [path for package in packages for path in sorted(package.rglob("*.py"))]
    return [(path.relative_to(ROOT).as_posix(), ast.parse(path.read_text("utf-8"))) for path in paths]


def named_families(tree: ast.Module) -> set[str]:
    """The family names that are string constants there, or keys of a call like dict(llama=...)."""
    constants = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    keywords = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    return {str(name) for name in (constants | keywords) & set(FAMILY_NAMES)}


def test_nothing_outside_a_familys_file_names_it() -> None:
    found = {path: named_families(tree) for path, tree in source_files()}
    naming = {path for path, names in found.items() if names}
    assert naming - FAMILY_FILES.keys() == ALLOWED.keys()
    for path, name in FAMILY_FILES.items():
        assert found[path] == {name}


def test_only_the_registry_imports_a_familys_file() -> None:
    for path, tree in source_files():
        imported = {
            f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        of_families = {name for name in imported if name.split(".")[:2] == ["cluster", "families"]}
        own = {name for name in of_families if len(name.split(".")) > 2 and name.split(".")[2] in FAMILY_NAMES}
        assert not own or path == "cluster/families/__init__.py", path


def test_every_family_is_registered_deployed_and_has_a_demo() -> None:
    assert tuple(FAMILIES) == FAMILY_NAMES
    assert tuple(FAMILY_DEPLOYMENTS) == FAMILY_NAMES
    assert tuple(RECIPES) == FAMILY_NAMES
    for name in FAMILY_NAMES:
        assert (DEMOS / name / "config.json").is_file()


def demo_model(family: FamilyName) -> Hyperparameters:
    config = json.loads((DEMOS / family / "config.json").read_text("utf-8"))
    return read_hyperparameters(DEMOS / family, config, family)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_record_has_every_part(name: FamilyName) -> None:
    family = FAMILIES[name]
    assert family.name == name
    assert all(family), "no entry is empty"
    assert family.vocabulary in get_args(VocabularyForm)
    assert family.transcript.user
    assert family.transcript.assistant
    assert family.transcript.stops
    demo = demo_model(name)
    assert demo.header
    assert demo.engines == ("bigdl", "openvino")


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_tensors_layout_container_and_graph_agree(name: FamilyName) -> None:
    family, model = FAMILIES[name], demo_model(name)
    rules = list(family.tensors(model))
    binary, sources = {rule.name for rule in rules}, {rule.source for rule in rules}
    assert {family.layout.embedding, family.layout.output} < sources
    container = family.container
    assert {container.embedding, container.output} < binary
    assert container.positions is None or container.positions in binary

    graph = dict(family.graph(model))
    optional = {part.tensor for parts in graph.values() for part in parts} - binary
    assert all(tensor.endswith(".bias") for tensor in optional)
    assert {part.tensor for parts in graph.values() for part in parts} >= binary
    assert graph["embedding.weight"][0].tensor == container.embedding
    assert graph["output.weight"][0].tensor == container.output
    assert ("position_embedding.weight" in graph) == (container.positions is not None)


def test_the_instructions_explain_every_entry() -> None:
    text = (ROOT / "docs/how-to/add-a-family.md").read_text("utf-8")
    assert all(f"`{entry}`" in text for entry in Family._fields)
