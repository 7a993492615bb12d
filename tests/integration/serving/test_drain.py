"""`nibble drain` on a node of a test cluster, with Serve's replicas on it."""

from __future__ import annotations

import subprocess
import sys

from tests.integration.processes import ROOT, sandbox

# In a process of its own, the driver of a cluster of a head and two workers with room for one replica each.
PROGRAM = """
import threading
import ray
from ray import serve
from ray.cluster_utils import Cluster
from cluster.commands.drain import GcsCluster, drain, node_drain_s, this_address
from cluster.config import LimitsConfig

nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
for number in (2, 3):
    nodes.add_node(num_cpus=1, node_ip_address=f"127.0.0.{number}")
nodes.wait_for_nodes()
ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")

@serve.deployment(num_replicas=1, graceful_shutdown_timeout_s=60, max_ongoing_requests=10)
class Slow:
    async def __call__(self, seconds):
        import asyncio
        await asyncio.sleep(seconds)
        return ray.util.get_node_ip_address()

serve.start(proxy_location="Disabled")
handle = serve.run(Slow.bind(), name="slow", route_prefix=None)
first = handle.remote(0).result()
cluster = GcsCluster(nodes.address)
assert {node.address for node in cluster.alive() if not node.head} == {"127.0.0.2", "127.0.0.3"}

in_flight = handle.remote(8)
said = []
drained = threading.Thread(target=drain, args=(cluster, first, LimitsConfig(drain_s=30), said.append))
drained.start()
answered = 0
while drained.is_alive():  # all the time, while the replica moves
    assert handle.remote(0.01).result(timeout_s=30) in ("127.0.0.2", "127.0.0.3")
    answered += 1
drained.join()
assert in_flight.result(timeout_s=0) == first, "the request in flight ended before the drain did"
second = handle.remote(0).result()
assert second != first, (first, second)
print("moved", first, second, answered, said)

# The cluster ends as a whole: no other node takes the replica, whose request ends all the same.
in_flight = handle.remote(8)
head = next(node for node in cluster.alive() if node.head)
assert this_address(cluster.alive(), nodes.address) == head.address
ends = threading.Thread(target=drain, args=(cluster, head.address, LimitsConfig(drain_s=30), said.append))
ends.start()


class Noted(GcsCluster):
    deadlines = []

    def drain(self, node_id, deadline_s):
        self.deadlines.append(deadline_s)
        super().drain(node_id, deadline_s)


drain(Noted(nodes.address), second, LimitsConfig(drain_s=30), said.append)
assert Noted.deadlines == [node_drain_s(LimitsConfig(drain_s=30)), 35], Noted.deadlines
assert in_flight.result(timeout_s=5) == second
ends.join()
assert cluster.ending() == head.node_id
print("ended", said)
serve.shutdown()
ray.shutdown()
nodes.shutdown()
"""


def test_a_drained_node_s_replica_starts_elsewhere_first_and_its_request_ends() -> None:
    with sandbox() as home:
        environment = {**home.environment, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(home.ray_tmpdir)}
        ended = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert "moved 127.0.0." in ended.stdout
        assert "ended" in ended.stdout
        assert home.wait_no_processes() == []
