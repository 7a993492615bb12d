"""The look-alike itself, with pods that need no Ray: it does what the kubelet and Services do."""

from __future__ import annotations

import asyncio
import os
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.k8s.lookalike import leftovers
from tests.k8s.lookalike.cluster import LookAlike, lookalike
from tests.k8s.lookalike.commands import NEEDED, missing
from tests.k8s.lookalike.documents import Manifests, quantity
from tests.k8s.lookalike.kubelet.cgroups import is_version_2
from tests.k8s.lookalike.kubelet.pods import Pod
from tests.k8s.lookalike.kuberay import ray_pods
from tests.k8s.lookalike.kuberay.ray_cluster import only_appends

pytestmark = pytest.mark.skipif(missing(*NEEDED) is not None, reason=f"the look-alike {missing(*NEEDED)}")

# Says its name to whoever connects and echoes lines; /ready says 200 as long as /scratch/unready is not there.
ECHO = """
import os, signal, socketserver, sys

class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            if line.startswith(b"GET"):
                status = "503 No" if os.path.exists("/scratch/unready") else "200 OK"
                self.wfile.write(f"HTTP/1.1 {status}\\r\\nContent-Length: 0\\r\\n\\r\\n".encode())
                return
            self.wfile.write(os.uname().nodename.encode() + b" " + line)

def ended(number, frame):
    open("/host/terminated", "a").write("SIGTERM\\n")
    os._exit(0)

signal.signal(signal.SIGTERM, ended)
socketserver.ThreadingTCPServer.allow_reuse_address = True
socketserver.ThreadingTCPServer(("0.0.0.0", 7000), Handler).serve_forever()
"""


def pod(name: str, script: str = ECHO, labels: dict[str, str] | None = None, **container: Any) -> dict[str, Any]:
    main = {
        "name": "main",
        "command": ["python", "-c", textwrap.dedent(script)],
        "ports": [{"name": "echo", "containerPort": 7000}],
        "resources": {"limits": {"cpu": "1", "memory": "256Mi"}},
        "securityContext": {
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
        "readinessProbe": {"httpGet": {"path": "/ready", "port": "echo"}, "periodSeconds": 0.1, "failureThreshold": 1},
        "volumeMounts": [
            {"name": "work", "mountPath": "/scratch"},
            {"name": "shared", "mountPath": "/dev/shm"},
            {"name": "settings", "mountPath": "/etc/settings"},
            {"name": "host", "mountPath": "/host"},
        ],
        **container,
    }
    spec = {
        "securityContext": {"runAsUser": 1000, "runAsGroup": 1000, "runAsNonRoot": True, "fsGroup": 2000},
        "terminationGracePeriodSeconds": 2,
        "containers": [main],
        "volumes": [
            {"name": "work", "emptyDir": {}},
            {"name": "shared", "emptyDir": {"medium": "Memory", "sizeLimit": "64Mi"}},
            {"name": "settings", "configMap": {"name": "settings"}},
            {"name": "host", "persistentVolumeClaim": {"claimName": "kept"}},
        ],
    }
    metadata = {"name": name, "namespace": "test", "labels": {"app": "echo", **(labels or {})}}
    return {"kind": "Pod", "metadata": metadata, "spec": spec}


SETTINGS = {"kind": "ConfigMap", "metadata": {"name": "settings", "namespace": "test"}, "data": {"a.txt": "first"}}
SERVICE = {
    "kind": "Service",
    "metadata": {"name": "echo", "namespace": "test"},
    "spec": {"selector": {"app": "echo"}, "ports": [{"port": 80, "targetPort": "echo"}]},
}


@pytest_asyncio.fixture
async def node() -> AsyncIterator[LookAlike]:
    async with lookalike() as made:
        yield made
    assert leftovers.left(os.getpid()) == []


async def ready(node: LookAlike, *names: str) -> list[Pod]:
    found = {pod.name: pod for pod in node.pods}
    await node.until(lambda: all(found[name].ready for name in names), f"{names} ready", 120)
    return [found[name] for name in names]


async def said(pod: Pod, script: str) -> str:
    assert pod.container is not None
    code, output = await pod.container.execute(["python", "-c", textwrap.dedent(script)])
    assert code == 0, output
    return output.strip()


async def test_a_pod_has_what_its_specification_says(node: LookAlike) -> None:
    env = [
        {"name": "WHO", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}},
        {"name": "GREETING", "value": "hello $(WHO)"},
    ]
    await node.apply(Manifests([SETTINGS, pod("one", env=env), pod("two", labels={"app": "other"})]))
    one, two = await ready(node, "one", "two")
    script = """
        import os, shutil, socket
        try:
            open("/written", "w")
        except OSError as error:
            print("root", error.strerror)
        open("/scratch/file", "w").write("x")
        print(os.getuid(), os.getgid(), os.getgroups(), os.environ["GREETING"], socket.gethostname())
        print(shutil.disk_usage("/dev/shm").total, open("/etc/settings/a.txt").read())
        print(socket.gethostbyname("two"), len([p for p in os.listdir("/proc") if p.isdigit()]) < 10)
    """
    assert (await said(one, script)).splitlines() == [
        "root Read-only file system",
        "1000 1000 [1000, 2000] hello echo one",
        f"{64 << 20} first",
        f"{two.address} True",
    ]
    assert one.address != two.address
    if one.container is not None and one.container.cgroup.folders:
        limit = "/sys/fs/cgroup/memory.max" if is_version_2() else "/sys/fs/cgroup/memory/memory.limit_in_bytes"
        assert await said(one, f"print(open({limit!r}).read())") == str(256 << 20)
    changed = {**SETTINGS, "data": {"a.txt": "second"}}
    await node.apply(Manifests([changed]))
    assert await said(one, "print(open('/etc/settings/a.txt').read())") == "second"


async def test_new_connections_go_to_ready_pods_and_established_ones_live_on(node: LookAlike) -> None:
    await node.apply(Manifests([SETTINGS, SERVICE, pod("one"), pod("two")]))
    one, two = await ready(node, "one", "two")
    (service,) = node.services
    assert {await name_of(service.address) for _ in range(6)} == {"one", "two"}

    reader, writer = await asyncio.open_connection(one.address, 7000)
    with closing(writer):
        writer.write(b"a\n")
        assert await reader.readline() == b"one a\n"
    while service.connections(one) or service.connections(two):
        await asyncio.sleep(0.01)
    reader, writer = await asyncio.open_connection(service.address, 80)
    with closing(writer):
        writer.write(b"a\n")
        chosen = one if (await reader.readline()).startswith(b"one") else two
        assert service.connections(chosen) == 1
        await said(chosen, "open('/scratch/unready', 'w')")
        await node.until(lambda: not chosen.ready, "not ready", 60)
        other = two if chosen is one else one
        assert {await name_of(service.address) for _ in range(4)} == {other.name}
        writer.write(b"b\n")
        assert await reader.readline() == f"{chosen.name} b\n".encode()


async def name_of(address: str) -> str:
    reader, writer = await asyncio.open_connection(address, 80)
    with closing(writer):
        writer.write(b"?\n")
        return (await reader.readline()).split()[0].decode()


async def test_a_deleted_pod_leaves_its_service_first_then_prestop_sigterm_and_the_end(node: LookAlike) -> None:
    hook = "import time; open('/host/hook', 'w').write('preStop'); time.sleep(1)"
    lifecycle = {"preStop": {"exec": {"command": ["python", "-c", hook]}}}
    await node.apply(Manifests([SETTINGS, SERVICE, pod("one", lifecycle=lifecycle), pod("two")]))
    one, two = await ready(node, "one", "two")
    (service,) = node.services
    kept = node.folder / "claims" / "test" / "kept"
    deletion = one.delete(10)
    assert service.pods() == [two]
    await node.until(lambda: (kept / "hook").exists(), "preStop", 60)
    assert not (kept / "terminated").exists(), "SIGTERM comes after preStop"
    await deletion
    assert (kept / "terminated").read_text() == "SIGTERM\n"
    assert node.pods == [two]


async def test_where_no_pod_is_ready_one_that_is_being_deleted_and_serves_takes_connections(node: LookAlike) -> None:
    lifecycle = {"preStop": {"sleep": {"seconds": 100}}}
    await node.apply(Manifests([SETTINGS, SERVICE, pod("one", lifecycle=lifecycle)]))
    (one,) = await ready(node, "one")
    (service,) = node.services
    one.delete(120)
    assert await name_of(service.address) == "one"
    await said(one, "open('/scratch/unready', 'w')")
    await node.until(lambda: not one.serving, "not serving", 60)
    assert service.pods() == []


async def test_what_ignores_sigterm_is_killed_after_its_grace_period(node: LookAlike) -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    await node.apply(Manifests([SETTINGS, pod("one", stubborn, readinessProbe=None)]))
    (one,) = await ready(node, "one")
    await one.delete()
    assert any("SIGKILL after 2 s" in event for event in node.events)


async def test_a_container_that_ends_starts_again_in_its_pod(node: LookAlike) -> None:
    await node.apply(Manifests([SETTINGS, pod("one")]))
    (one,) = await ready(node, "one")
    await said(one, "open('/scratch/file', 'w').write('kept')")
    assert one.container is not None
    before = one.container
    before.signal(9)
    await node.until(lambda: one.restarts == 1 and one.ready, "restarted", 120)
    assert one.container is not before
    assert await said(one, "print(open('/scratch/file').read())") == "kept"


async def test_a_liveness_probe_that_fails_restarts_the_container(node: LookAlike) -> None:
    liveness = {"httpGet": {"path": "/ready", "port": 7000}, "initialDelaySeconds": 3, "periodSeconds": 0.1}
    await node.apply(Manifests([SETTINGS, pod("one", livenessProbe=liveness)]))
    (one,) = await ready(node, "one")
    await said(one, "open('/scratch/unready', 'w')")
    await node.until(lambda: one.restarts == 1, "restarted", 120)


@pytest.mark.skipif(missing("nft") is not None, reason=f"policies: {missing('nft')}")
async def test_policies_are_kept_by_the_kernel() -> None:
    policy = {
        "kind": "NetworkPolicy",
        "metadata": {"name": "p", "namespace": "test"},
        "spec": {
            "podSelector": {"matchLabels": {"part": "server"}},
            "ingress": [
                {"from": [{"podSelector": {"matchLabels": {"part": "friend"}}}], "ports": [{"port": 7000}]},
            ],
        },
    }
    pods = [pod(part, labels={"part": part}) for part in ("server", "friend", "stranger")]
    async with lookalike(enforce_policies=True) as node:
        await node.apply(Manifests([SETTINGS, policy, *pods]))
        server, friend, stranger = await ready(node, "server", "friend", "stranger")
        connect = f"""
            import socket
            try:
                socket.create_connection(({server.address!r}, 7000), timeout=1)
                print("reached")
            except OSError:
                print("refused")
        """
        assert await said(friend, connect) == "reached"
        assert await said(stranger, connect) == "refused"


def test_quantities() -> None:
    assert [quantity(each) for each in ("500m", "2", 3, "4Gi", "1k")] == [0.5, 2, 3, 4 << 30, 1000]
    with pytest.raises(ValueError, match="quantity: found '4 GB'"):
        quantity("4 GB")


KILLED = """
import asyncio, sys
from tests.k8s.lookalike.kubelet.cgroups import is_version_2
from tests.k8s.lookalike.cluster import lookalike
from tests.k8s.lookalike.documents import Manifests
from tests.k8s.test_cluster_lookalike import SETTINGS, pod

async def main():
    async with lookalike() as node:
        await node.apply(Manifests([SETTINGS, pod("one")]))
        await node.until(lambda: node.pods[0].ready, "ready", 60)
        print(node.pods[0].sandbox.pid, node.pods[0].container.main_pid, flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_a_run_that_is_killed_leaves_no_process_and_the_next_one_sweeps_the_rest() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", KILLED, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    pids = [Path(f"/proc/{pid}") for pid in (await process.stdout.readline()).decode().split()]
    assert len(pids) == 2
    assert all(pid.exists() for pid in pids)
    process.kill()
    await process.wait()
    while any(pid.exists() for pid in pids):
        await asyncio.sleep(0.05)
    assert leftovers.left(process.pid) != []
    await leftovers.sweep()
    assert leftovers.left(process.pid) == []


def ray_cluster() -> dict[str, Any]:
    def group(**limits: str) -> dict[str, Any]:
        return {"template": {"spec": {"containers": [{"name": "ray", "resources": {"limits": limits}}]}}}

    head = {**group(cpu="1500m", memory="1Gi"), "rayStartParams": {"num-gpus": "0"}}
    worker = {**group(cpu="4", memory="2Gi"), "groupName": "w", "replicas": 1, "labels": {"zone": "b", "isa": "amx"}}
    return {"headGroupSpec": head, "workerGroupSpecs": [worker]}


def test_the_start_command_is_kuberays() -> None:
    spec = ray_cluster()
    cluster = {"name": "c-x", "namespace": "n", "uid": "u", "spec": spec}
    (head,) = ray_pods.pod_document(cluster, spec["headGroupSpec"], head=True)["spec"]["containers"]
    assert head["command"] == ["/bin/bash", "-c", "--"]
    assert head["args"] == [
        "ulimit -n ${RAY_START_ULIMIT_OPEN_FILES:-65536}; ray start --head --block --dashboard-agent-listen-port=52365"
        " --dashboard-host=0.0.0.0 --memory=1073741824 --metrics-export-port=8080 --num-cpus=2 --num-gpus=0"
    ]
    pod = ray_pods.pod_document(cluster, spec["workerGroupSpecs"][0], head=False)
    (worker,) = pod["spec"]["containers"]
    assert worker["args"] == [
        "ulimit -n ${RAY_START_ULIMIT_OPEN_FILES:-65536}; ray start --address=c-x-head-svc.n.svc.cluster.local:6379"
        " --block --dashboard-agent-listen-port=52365 --labels=isa=amx,zone=b --memory=2147483648"
        " --metrics-export-port=8080 --num-cpus=4"
    ]
    assert pod["metadata"]["labels"]["ray.io/serve"] == "true"
    assert {"name": "RAY_ADDRESS", "value": "c-x-head-svc.n.svc.cluster.local:6379"} in worker["env"]
    assert pod["spec"]["volumes"] == [{"name": "shared-mem", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}}]


def test_replicas_and_appended_groups_make_no_new_cluster() -> None:
    before = ray_cluster()
    scaled, appended, changed = ray_cluster(), ray_cluster(), ray_cluster()
    scaled["workerGroupSpecs"][0]["replicas"] = 5
    appended["workerGroupSpecs"].append({**before["workerGroupSpecs"][0], "groupName": "other"})
    changed["workerGroupSpecs"][0]["labels"] = {}
    assert [only_appends(before, after) for after in (scaled, appended, changed)] == [True, True, False]
    assert not only_appends(appended, before)
