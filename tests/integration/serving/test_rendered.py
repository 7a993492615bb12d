"""A rendered configuration, deployed as `serve deploy` and KubeRay do: by the controller, from a document."""

from __future__ import annotations

import subprocess
import sys

from tests.integration.processes import ROOT, sandbox

# In a process of its own, whose Ray node is a cluster as nibble starts it. `serve deploy` itself asks the dashboard,
# which hands the same document to the same method of the controller.
PROGRAM = """
import json, os, sys, time
import httpx, ray, yaml
from cluster.config import NibbleConfig
from cluster.ray_cluster import free_ports, local_cluster

http, grpc = free_ports(2)

def configuration(**changes):
    model = {"name": "bloom", "family": "bloom", "checkpoint": "builtin:bloom", "threads": 1}
    other = {"name": "other", "family": "llama", "checkpoint": "builtin:llama", "threads": 1}
    sleeping = {**other, "name": "sleeping", "replicas": {"min": 0, "max": 2}}
    models = [model, {**other, **changes.pop("other", {})}, sleeping]
    return {"http": {"port": http}, "grpc": {"port": grpc}, "models": models, **changes}

def deploy(client, config):
    from ray.serve.schema import ServeDeploySchema
    from deployments.app import rendered
    text = yaml.safe_dump(rendered(NibbleConfig.model_validate(config)))  # through YAML, as a file
    client.deploy_apps(ServeDeploySchema.model_validate(yaml.safe_load(text)))

def until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)

def complete(model, **fields):
    body = {"model": model, "prompt": "Q: What is CPU? A:", "max_tokens": 4, "temperature": 0, **fields}
    return httpx.post(f"http://127.0.0.1:{http}/v1/completions", json=body, timeout=60)

def replicas(model):
    names = ray.util.list_named_actors(all_namespaces=True)
    return {each["name"] for each in names if f"#{model}#" in each["name"]}

def ready():
    try:
        return httpx.get(f"http://127.0.0.1:{http}/readyz", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False

with local_cluster(8, reserved=(http, grpc)):
    from ray import serve
    from cluster.commands.status import ray_serve
    from deployments.app import grpc_options
    ray_serve().start(http_options={"host": "127.0.0.1", "port": http}, grpc_options=grpc_options(grpc))
    client = serve.context._get_global_client()
    deploy(client, configuration())
    until(ready)
    answers = {model: complete(model).json()["choices"][0]["text"] for model in ("bloom", "other")}
    before = {model: replicas(model) for model in answers}

    deploy(client, configuration(limits={"max_tokens": 3}))
    until(lambda: complete("bloom").status_code == 400)
    assert {model: replicas(model) for model in answers} == before, "limits restart nothing"
    assert replicas("sleeping") == set(), "a request starts it, and nothing else"
    woken = complete("sleeping", max_tokens=3)
    assert woken.status_code == 200, woken.text
    assert len(replicas("sleeping")) == 1

    deploy(client, configuration(limits={"max_tokens": 3}, other={"context": 128}))
    while len(now := replicas("other")) != 1 or now == before["other"]:
        answer = complete("other", max_tokens=3)
        assert answer.status_code == 200, f"requests wait for the new replica: {answer.text}"
    assert replicas("bloom") == before["bloom"], "only what changed"
    assert complete("other", max_tokens=3).status_code == 200
    print(json.dumps(answers))
"""


def test_a_rendered_configuration_serves_and_changes_only_what_differs() -> None:
    with sandbox() as home:
        environment = {**home.environment, "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert "A CPU is" in ended.stdout
        assert home.wait_no_processes() == []
