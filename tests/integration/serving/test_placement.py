"""Where a model's replicas run, on a test cluster whose nodes have labels."""

from __future__ import annotations

import subprocess
import sys

import pytest
import ray

from cluster.machine.isa import ISA_LABEL, choose_isa
from tests.integration.processes import ROOT, sandbox

# In a process of its own, the driver of a cluster of a head without labels and two workers.
PROGRAM = """
import subprocess, sys, time
import ray, yaml
from ray import serve
from ray.cluster_utils import Cluster
from cluster.config import NibbleConfig
from cluster.nodes_config import NodesConfig
from cluster.node_labels import meets, unmet
from cluster.ray_cluster import free_ports

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
labels = {"127.0.0.2": {"nibble/isa": "avx2", "zone": "a"}, "127.0.0.3": {"nibble/isa": "avx512"}}
for address in labels:
    cluster.add_node(num_cpus=2, node_ip_address=address, labels=labels[address])
cluster.wait_for_nodes()
ray.init(address=cluster.address, namespace="nibble", log_to_driver=False, logging_level="ERROR")

# What nibble says of a selector is what Ray does with it.
@ray.remote(num_cpus=1)
def place():
    return ray.util.get_node_ip_address()

nodes = {node["NodeManagerAddress"]: node["Labels"] for node in ray.nodes()}
for given in (
    {"isa": ["avx2"]}, {"isa": ["avx512", "amx"]}, {"labels": {"zone": "!a"}}, {"labels": {"nibble/isa": "!avx2"}},
    {"isa": ["amx"], "fallback": [{"labels": {"zone": ["a", "b"]}}]}, {"isa": ["amx"], "fallback": [{}]},
):
    placed = NodesConfig.model_validate(given)
    selectors = [placed.selector, *(each.selector for each in placed.fallback)]
    allowed = {address for address, own in nodes.items() if any(meets(each, own) for each in selectors)}
    found = ray.get(place.options(**placed.actor_options).remote(), timeout=60)
    assert found in allowed, (given, found, allowed)
    assert unmet(placed, list(nodes.values())) is None

# A node without the label is one of those that do not have the value: here the only one that has no zone.
for _ in range(20):
    options = NodesConfig.model_validate({"labels": {"zone": "!a", "nibble/isa": ["avx2", "avx512"]}}).actor_options
    assert ray.get(place.options(**options).remote(), timeout=60) == "127.0.0.3"

# A model that no node may run waits, says for which label, and runs where a node has it.
http, grpc = free_ports(2)
model = {"name": "bloom", "family": "bloom", "checkpoint": "builtin:bloom", "threads": 1, "nodes": {"isa": ["amx"]}}
config = NibbleConfig.model_validate({
    "http": {"port": http}, "grpc": {"port": grpc}, "models": [model],
    "router": {"nodes": {"labels": {"zone": "a"}}},
})
from ray.serve.schema import ServeDeploySchema
from deployments.app import grpc_options, rendered
http_options = {"host": "127.0.0.1", "port": http}
serve.start(proxy_location="HeadOnly", http_options=http_options, grpc_options=grpc_options(grpc))
document = ServeDeploySchema.model_validate(rendered(config) | {"proxy_location": "HeadOnly"})
serve.context._get_global_client().deploy_apps(document)

def until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, last
        time.sleep(0.5)

last = ""
def status():
    global last
    command = [sys.executable, "-m", "cluster.cli", "status", "--address", cluster.address]
    ended = subprocess.run(command, capture_output=True, text=True)
    last = ended.stdout + ended.stderr
    return " ".join(last.split())

until(lambda: "no node has the label" in (told := status()) and "nibble/isa=amx; nibble/isa is avx2, avx512" in told)
cluster.add_node(num_cpus=1, node_ip_address="127.0.0.4", labels={"nibble/isa": "amx"})
until(lambda: "1 running" in status())

def of_deployment(name):
    from ray._private.state import actors
    alive = [actor for actor in actors().values() if actor["State"] == "ALIVE"]
    (node,) = {actor["Address"]["IPAddress"] for actor in alive if f"#{name}#" in actor["Name"]}
    return node

assert of_deployment("bloom") == "127.0.0.4"
assert of_deployment("router") == "127.0.0.2"
print("placed")
serve.shutdown()
ray.shutdown()
cluster.shutdown()
"""


def test_replicas_run_where_labels_say_and_a_label_that_is_missing_is_named() -> None:
    with sandbox(COLUMNS="300") as home:
        environment = {**home.environment, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(home.ray_tmpdir)}
        ended = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert "placed" in ended.stdout
        assert home.wait_no_processes() == []


@pytest.mark.usefixtures("ray_node")
def test_a_node_that_nibble_starts_has_its_instruction_set_as_a_label() -> None:
    (node,) = ray.nodes()
    assert node["Labels"][ISA_LABEL] == choose_isa()
