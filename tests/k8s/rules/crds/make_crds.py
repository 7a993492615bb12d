"""Makes this folder's files of CustomResourceDefinitions as their projects publish them: `python make_crds.py FILE…`.

Of each the schema of version v1, without descriptions and examples, as compact JSON.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import yaml

VERSION = "v1"


def compact(schema: Any) -> Any:
    """Without what only people read. A property may have the name of a keyword: below `properties` all stay."""
    if isinstance(schema, list):
        return [compact(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: compact(each) for name, each in value.items()} if key == "properties" else compact(value)
        for key, value in schema.items()
        if key not in ("description", "example", "externalDocs")
    }


def main(files: list[str]) -> None:
    for file in files:
        crd = yaml.load(Path(file).read_text(), Loader=yaml.CSafeLoader)
        (version,) = (each for each in crd["spec"]["versions"] if each["name"] == VERSION)
        names = crd["spec"]["names"]
        made = {
            "apiVersion": f"{crd['spec']['group']}/{VERSION}",
            "kind": names["kind"],
            "schema": compact(version["schema"]["openAPIV3Schema"]),
        }
        target = Path(__file__).with_name(f"{names['kind'].lower()}.json.gz")
        target.write_bytes(gzip.compress(json.dumps(made, separators=(",", ":")).encode(), mtime=0))


if __name__ == "__main__":
    main(sys.argv[1:])
