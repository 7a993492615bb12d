"""`nibble render`: a configuration for clusters that nibble does not start: `serve deploy`, and KubeRay."""

from __future__ import annotations

import yaml

from cluster.config import NibbleConfig
from cluster.serve_settings import serve_settings
from deployments.app import rendered

MADE = "# Made by `nibble render`, do not edit.\n"


class BlockText(str):
    """Written as a literal block of YAML."""


class Dumper(yaml.SafeDumper):
    pass


Dumper.add_representer(
    BlockText, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|")
)


def serve_config(config: NibbleConfig) -> str:
    """A document of `serve deploy`, and a RayService's serveConfigV2."""
    return yaml.safe_dump(rendered(config), sort_keys=False)


def rayservice_patch(config: NibbleConfig, name: str) -> str:
    """Sets serveConfigV2 of the RayService of this name, as a patch of kustomize or `kubectl patch --type merge`."""
    patch = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": name},
        "spec": {"serveConfigV2": BlockText(serve_config(config))},
    }
    return MADE + yaml.dump(patch, Dumper=Dumper, sort_keys=False, width=1 << 20)


def settings_file(config: NibbleConfig) -> str:
    """A line NAME=VALUE for each variable that every process of Ray in the cluster needs."""
    return MADE + "".join(f"{name}={value}\n" for name, value in serve_settings(config.limits).items())
