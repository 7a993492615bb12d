"""What the API server would refuse: fields that a schema does not have, wrong types, and CEL rules that do not hold."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from kubernetes_validate.utils import all_versions

from tests.k8s.rules.manifests import Document

cel = pytest.importorskip("cel", reason="common-expression-language needs Python 3.11")

CRDS = Path(__file__).parent / "crds"
OLDEST = (1, 30)
VERSIONS = [each for each in dict.fromkeys(all_versions()) if tuple(map(int, each.split(".")[:2])) >= OLDEST]


@cache
def custom_kinds() -> dict[tuple[str, str], Document]:
    """The schemas of crds/, by apiVersion and kind."""
    read = [json.loads(gzip.decompress(file.read_bytes())) for file in sorted(CRDS.glob("*.json.gz"))]
    read += [json.loads(file.read_text()) for file in sorted(CRDS.glob("*.json"))]
    return {(each["apiVersion"], each["kind"]): each["schema"] for each in read}


def schema_findings(document: Document, versions: Sequence[str] = VERSIONS) -> list[str]:
    """Of one document, of a custom kind or of Kubernetes' own from OLDEST to the newest version."""
    text, where = json.dumps(document), f"{document['kind']} {document['metadata'].get('name')}"
    if (document["apiVersion"], document["kind"]) in custom_kinds():
        found = custom_findings(text)
    else:
        found = [finding for version in versions if (finding := core_finding(text, version))]
    return [f"{where}: {each}" for each in found]


@cache
def custom_findings(text: str) -> list[str]:
    document = json.loads(text)
    kind = document["apiVersion"], document["kind"]
    schema = custom_kinds()[kind]
    defaulted = with_defaults(schema, document)
    found = [f"{error.json_path}: {error.message}" for error in validator(*kind).iter_errors(defaulted)]
    return [*found, *repeated_keys(schema, defaulted, "$"), *broken_rules(schema, defaulted, "$")]


@cache
def core_finding(document: str, version: str) -> str | None:
    try:
        kubernetes_validate.validate(json.loads(document), version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"Kubernetes {version}: {error.json_path}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError as error:
        return f"Kubernetes {version}: {error.message}"
    return None


@cache
def validator(api_version: str, kind: str) -> Any:
    return jsonschema.Draft4Validator(strict(custom_kinds()[api_version, kind], top=True))


def strict(schema: Any, top: bool = False) -> Any:
    """An OpenAPI schema as a JSON schema that refuses what the structural schema does not name."""
    if not isinstance(schema, dict):
        return schema
    made = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    made = {key: value for key, value in made.items() if key not in ("format", "default", "nullable")}
    for key in ("allOf", "anyOf", "oneOf"):
        if key in made:
            made[key] = [{k: v for k, v in strict(each).items() if k != "additionalProperties"} for each in made[key]]
    for key in ("items", "additionalProperties", "not"):
        if key in made:
            made[key] = strict(made[key])
    if "properties" in made:
        made["properties"] = {name: strict(each) for name, each in made["properties"].items()}
        if top:
            made["properties"] |= {"apiVersion": {"type": "string"}, "metadata": {"type": "object"}}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    if schema.get("nullable") and isinstance(made.get("type"), str):
        made["type"] = [made["type"], "null"]
    return made


def with_defaults(schema: Document, value: Any) -> Any:
    """As the API server does first."""
    if isinstance(value, dict):
        properties, extra = schema.get("properties", {}), schema.get("additionalProperties")
        filled = {name: deepcopy(each["default"]) for name, each in properties.items() if "default" in each} | value
        return {key: with_defaults(properties.get(key) or mapping(extra), each) for key, each in filled.items()}
    if isinstance(value, list):
        return [with_defaults(mapping(schema.get("items")), each) for each in value]
    return value


def mapping(schema: Any) -> Document:
    return schema if isinstance(schema, dict) else {}


def parts(schema: Document, value: Any, where: str) -> Iterator[tuple[Document, Any, str]]:
    """Each value in a document with its schema, the document itself first."""
    yield schema, value, where
    if isinstance(value, dict):
        properties, extra = schema.get("properties", {}), schema.get("additionalProperties")
        for key, each in value.items():
            yield from parts(properties.get(key) or mapping(extra), each, f"{where}.{key}")
    if isinstance(value, list):
        for index, each in enumerate(value):
            yield from parts(mapping(schema.get("items")), each, f"{where}[{index}]")


def repeated_keys(schema: Document, document: Document, where: str) -> list[str]:
    found = []
    for part, value, place in parts(schema, document, where):
        if part.get("x-kubernetes-list-type") == "map":
            names = part["x-kubernetes-list-map-keys"]
            keys = [tuple(each.get(name) for name in names) for each in value]
            found += [
                f"{place}: {key} appears more than once" for key in sorted({k for k in keys if keys.count(k) > 1})
            ]
    return found


def broken_rules(schema: Document, document: Document, where: str) -> list[str]:
    """CEL rules that do not hold; those of changes (oldSelf) have nothing to say of a new document."""
    found = []
    for part, value, place in parts(schema, document, where):
        for rule in part.get("x-kubernetes-validations", []):
            if "oldSelf" not in rule["rule"] and not cel.evaluate(rule["rule"], {"self": value}):
                found.append(f"{place}: {rule.get('message', rule['rule'])}")
    return found
