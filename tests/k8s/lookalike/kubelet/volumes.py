"""A pod's volumes as folders of this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from tests.k8s.lookalike.documents import Document, Manifests, quantity
from tests.k8s.lookalike.kubelet.environment import values


class Volume(NamedTuple):
    """`size`: of a tmpfs that the pod's sandbox mounts there, in bytes; None: a plain folder. `read_only`: whatever the
    mount says."""

    folder: Path
    size: int | None = None
    read_only: bool = False


def prepare(
    spec: Document, namespace: str, pod_folder: Path, node_folder: Path, manifests: Manifests
) -> dict[str, Volume]:
    """By name. Raises ValueError for a kind that the look-alike does not know, or a reference to what is not there."""
    group = spec.get("securityContext", {}).get("fsGroup")
    volumes = {}
    for volume in spec.get("volumes", []):
        made = make(volume, namespace, pod_folder / "volumes" / volume["name"], node_folder, manifests)
        made.folder.mkdir(parents=True, exist_ok=True)
        if made.read_only:
            write(volume, namespace, made.folder, manifests, group)
        elif "hostPath" not in volume:  # to which Kubernetes gives no group
            if group is not None:
                os.chown(made.folder, 0, group)
            made.folder.chmod(0o2777 if group is not None else 0o777)
        volumes[volume["name"]] = made
    return volumes


def make(volume: Document, namespace: str, folder: Path, node_folder: Path, manifests: Manifests) -> Volume:
    if "emptyDir" in volume:
        source = volume["emptyDir"] or {}
        if source.get("medium") != "Memory":
            return Volume(folder)
        return Volume(folder, int(quantity(source.get("sizeLimit", "1Gi"))))
    if "configMap" in volume or "secret" in volume:
        return Volume(folder, read_only=True)
    if "hostPath" in volume:
        return Volume(node_folder / "host" / volume["hostPath"]["path"].lstrip("/"))
    if "persistentVolumeClaim" in volume:
        return Volume(node_folder / "claims" / namespace / volume["persistentVolumeClaim"]["claimName"])
    raise ValueError(f"volumes: {volume}: allowed are emptyDir, configMap, secret, hostPath and persistentVolumeClaim")


def write(volume: Document, namespace: str, folder: Path, manifests: Manifests, group: int | None) -> None:
    """The files of a ConfigMap or a Secret, again where the object has changed."""
    kind = "ConfigMap" if "configMap" in volume else "Secret"
    source = volume["configMap" if kind == "ConfigMap" else "secret"]
    contents = values(manifests, kind, source, namespace)
    items = source.get("items") or [{"key": key, "path": key} for key in contents]
    for item in items:
        file = folder / item["path"]
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_name(f".{file.name}.new")
        scratch.write_bytes(contents[item["key"]])
        if group is not None:
            os.chown(scratch, 0, group)
        scratch.chmod(item.get("mode", source.get("defaultMode", 0o644)) | (0o040 if group is not None else 0))
        scratch.replace(file)
