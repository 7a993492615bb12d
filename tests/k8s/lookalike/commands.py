"""Commands of the system: ip, mount, nft."""

from __future__ import annotations

import asyncio
import os
import shutil


class CommandError(RuntimeError):
    """A command of the system failed; the message has what it said."""


async def run(*command: str, stdin: str | None = None) -> str:
    """Its output. Raises CommandError."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate(None if stdin is None else stdin.encode())
    if process.returncode != 0:
        raise CommandError(f"{' '.join(command)}: exit code {process.returncode}: {errors.decode().strip()}")
    return output.decode()


def missing(*commands: str) -> str | None:
    """Why the look-alike cannot run here; None where it can."""
    if os.getuid() != 0:
        return "needs root: network namespaces, mounts and cgroups"
    absent = [command for command in commands if shutil.which(command) is None]
    return f"needs {', '.join(absent)}, not found on PATH" if absent else None


NEEDED = ("ip", "unshare", "nsenter", "setpriv", "mount", "pivot_root")
