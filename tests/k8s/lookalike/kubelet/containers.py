"""A container: a process tree in namespaces of its own, below the pod's."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.k8s.lookalike.documents import Document, quantity
from tests.k8s.lookalike.kubelet import image
from tests.k8s.lookalike.kubelet.cgroups import Cgroup
from tests.k8s.lookalike.kubelet.environment import expanded, resolved

if TYPE_CHECKING:
    from tests.k8s.lookalike.kubelet.pods import Pod

DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")


class Container:
    """One start of a container. `process` is its parent outside of its PID namespace; None before `start`."""

    process: asyncio.subprocess.Process | None = None

    def __init__(self, pod: Pod, document: Document, attempt: int) -> None:
        self.pod = pod
        self.name = f"{document['name']}-{attempt}"
        self.document = document
        self.environment = {"HOSTNAME": pod.name, **image.ENVIRONMENT, **pod.node.service_variables(pod.namespace)}
        self.environment |= resolved(document, pod, pod.node.manifests)
        self.log = pod.folder / f"{self.name}.log"
        limits = document.get("resources", {}).get("limits", {})
        self.cgroup = Cgroup.make(
            f"{pod.name}.{self.name}",
            quantity(limits["cpu"]) if "cpu" in limits else None,
            int(quantity(limits["memory"])) if "memory" in limits else None,
        )

    @property
    def command(self) -> list[str]:
        command = self.document.get("command") or image.entry_point(self.document.get("image", ""))
        words = [*command, *self.document.get("args", [])]
        return [expanded(word, self.environment) for word in words]

    def _security(self, field: str, default: Any = None) -> Any:
        own = self.document.get("securityContext", {})
        return own.get(field, self.pod.spec.get("securityContext", {}).get(field, default))

    def privileges(self) -> list[str]:
        """setpriv's arguments for the container's user."""
        user = self._security("runAsUser", 0)
        group = self._security("runAsGroup", 0)
        if user == 0 and self._security("runAsNonRoot"):
            raise ValueError(f"container {self.name}: runAsNonRoot is set and its user is root")
        groups = [str(each) for each in {group, self._security("fsGroup", group)}]
        chosen = [f"--reuid={user}", f"--regid={group}", f"--groups={','.join(groups)}", "--pdeathsig=KILL"]
        if not self._security("allowPrivilegeEscalation", True):
            chosen.append("--no-new-privs")
        if "ALL" in self._security("capabilities", {}).get("drop", []):
            chosen += ["--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all"]
        return chosen

    def binds(self) -> list[tuple[str, str, bool]]:
        """Source, target, read-only; what is below another target comes after it."""
        found = []
        for mount in self.document.get("volumeMounts", []):
            volume = self.pod.volumes[mount["name"]]
            source = volume.folder / mount.get("subPath", "")
            found.append((str(source), mount["mountPath"], volume.read_only or mount.get("readOnly", False)))
        own = [(source, target, True) for source, target in (*self.cgroup.mounts(), *self.pod.node.image)]
        own += [
            (str(self.pod.node.network.hosts), "/etc/hosts", True),
            (str(self.pod.hostname_file), "/etc/hostname", True),
        ]
        return sorted([*own, *found], key=lambda each: each[1])

    async def start(self) -> None:
        specification = {
            "layers": str(self.pod.folder / "layers" / self.name),
            "read": image.READ,
            "binds": self.binds(),
            "read_only_root": self._security("readOnlyRootFilesystem", False),
            "directory": self.document.get("workingDir", "/tmp"),
            "environment": self.environment,
            "privileges": self.privileges(),
            "command": self.command,
        }
        file = self.pod.folder / f"{self.name}.json"
        file.write_text(json.dumps(specification))
        program = Path(__file__).with_name("container_init.py")
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self.cgroup.joining(), *DIE_WITH_PARENT, *self.pod.entering("-m", "-n", "-u", "-i"),
                "unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child",
                sys.executable, "-IS", str(program), str(file),
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, env={"PATH": os.environ["PATH"]},
            )  # fmt: skip

    @property
    def main_pid(self) -> int | None:
        """Its first process, as this machine counts; None where it has ended."""
        if self.process is None:
            return None
        try:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        except OSError:
            return None
        return int(children[0]) if children else None

    def processes(self) -> list[tuple[int, str]]:
        """All of it, with their command lines."""
        main = self.main_pid
        if main is None:
            return []
        wanted, found = os.readlink(f"/proc/{main}/ns/pid"), []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.readlink(process / "ns" / "pid") == wanted:
                    words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found.append((int(process.name), words.strip()))
        return found

    async def execute(self, command: list[str], timeout: float | None = None) -> tuple[int, str]:
        """Exit code and output, as `kubectl exec` would give them; at a timeout the command is killed, and -1."""
        main = self.main_pid
        if main is None:
            return -1, "the container has ended"
        enter = ["/usr/bin/nsenter", "-t", str(main), "-m", "-n", "-u", "-i", "-p", "-r"]
        process = await asyncio.create_subprocess_exec(
            *self.cgroup.joining(), *enter, "setpriv", *self.privileges(), *command,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            env=self.environment,
        )  # fmt: skip
        try:
            output, _ = await asyncio.wait_for(process.communicate(), timeout)
        except asyncio.TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            return -1, f"killed after {timeout} s"
        return process.returncode or 0, output.decode(errors="replace")

    def signal(self, number: int) -> None:
        """To its first process, as the container runtime does."""
        main = self.main_pid
        if main is not None:
            with suppress(ProcessLookupError):
                os.kill(main, number)

    async def stop(self, grace: float) -> None:
        """preStop, SIGTERM, and SIGKILL `grace` seconds after the beginning, at least two after SIGTERM."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace
        hook = self.document.get("lifecycle", {}).get("preStop", {})
        assert self.process is not None, "it was started"
        if "exec" in hook and self.process.returncode is None:
            code, output = await self.execute(hook["exec"]["command"], grace)
            self.pod.node.event(f"{self.pod.name}: preStop: exit code {code} {output.strip()[-300:]}")
        elif "sleep" in hook:
            await asyncio.sleep(min(grace, hook["sleep"]["seconds"]))
        self.signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(asyncio.shield(self.process.wait()), max(2.0, deadline - loop.time()))
        except asyncio.TimeoutError:
            self.pod.node.event(f"{self.pod.name}: SIGKILL after {grace:.0f} s")
            await self.kill()

    async def kill(self) -> None:
        """All of it: the kernel ends a PID namespace with its first process, and `process` waits for that one."""
        if self.process is None or self.process.returncode is not None:
            return
        if self.main_pid is None:
            with suppress(ProcessLookupError):
                self.process.kill()
        self.signal(signal.SIGKILL)
        await self.process.wait()
