"""Runs Serve's HAProxy with what Serve has no setting for. A program of its own, of the standard library alone:

    python -I haproxy_run.py HAPROXY ARGUMENTS…

- The configuration that Serve wrote (`-f`) gets timeouts for a request's head, a bound on the connections of one
  address, and errors in OpenAI's form (`amended`).
- Without splice(2), `-dS`: with `option splice-request`, which Serve always sets, HAProxy 2.8 does not notice that a
  client has left if the request's body came in a packet of its own, as many clients send it: the engine would go on
  until the deadline. (HAProxy's management guide, section 3.)
- Not longer than Serve's actor that started it: if that one is killed, HAProxy would keep the port, and the next one
  would get a part of the connections only.
- A process beside it takes the port at once where it dies (`haproxy_stand_in.py`).
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1  # of prctl(2); it stays through execv
# Seconds for the head of a request. Whoever sends half of it holds a connection no longer.
HEAD_TIMEOUT_S = 10
CONNECTIONS = 16_384  # in all; one address may have half of them
OWN_FILES = 256
LAST = ".last"  # what the file's name has more, of the configuration in force
ROUTERS = re.compile(r"^ *server (?!.*\bbackup\b)", re.MULTILINE)  # Serve's own fallback is a backup
MARK = "# amended by nibble (cluster/haproxy/haproxy_run.py)\n"
UNAVAILABLE = "no replica of the router answers; try again in a moment"
# The answer where no router replica takes a request, or one died with it: in OpenAI's form.
ERROR = {"error": {"message": UNAVAILABLE, "type": "server_error", "param": None, "code": "no_replica"}}
UNAVAILABLE_HTTP = f"return status 503 content-type application/json hdr Retry-After 1 string '{json.dumps(ERROR)}'"
# The router's application (cluster.model_config.ROUTER_APP). While it is taken away, Serve's fallback proxy still
# answers for it, and knows no path of it any more. The router itself says nothing in plain text, and does not name
# Serve's API.
ROUTER = "nibble"
NO_PATH_HTTP = f"    http-response {UNAVAILABLE_HTTP} if {{ status 404 }} {{ res.hdr(content-type) -m beg text/plain }}"
NO_PATH = "if { res.hdr(grpc-message) -m sub ListApplications }"
NO_PATH_GRPC = (
    f"    http-response set-header grpc-status 14 {NO_PATH}\n"
    f'    http-response set-header grpc-message "{UNAVAILABLE}" {NO_PATH}'
)


def error_page(folder: Path) -> Path:
    body = json.dumps(ERROR)
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
        f"Cache-Control: no-cache\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    page = folder / "503.http"
    page.write_text(head + body)
    return page


def amended(config: str, page: Path, connections: int = CONNECTIONS) -> str:
    """Serve's configuration with nibble's changes, for so many connections. Raises ValueError where it has no section
    `defaults` any more."""
    config, sections = re.subn(
        r"^defaults\n", f"defaults\n    timeout http-request {HEAD_TIMEOUT_S}s\n", config, flags=re.MULTILINE
    )
    if sections != 1:
        raise ValueError(f"haproxy.cfg: found {sections} sections `defaults`, expected 1")
    config = re.sub(r"^( *errorfile 50[234]) .*$", rf"\g<1> {page}", config, flags=re.MULTILINE)
    config = re.sub(r"^( *maxconn) \d+$", rf"\g<1> {connections}", config, flags=re.MULTILINE)
    # Where there is no router at all, which has every path, Serve says that the path is not found.
    config = re.sub(
        r"^( *)http-request return status 404 .*$", rf"\g<1>http-request {UNAVAILABLE_HTTP}", config, flags=re.MULTILINE
    )
    config = re.sub(
        r'grpc-status 5 hdr grpc-message "Application [^"]*"',
        f'grpc-status 14 hdr grpc-message "{UNAVAILABLE}"',
        config,
    )
    config = re.sub(rf"^backend http-{ROUTER}\n", rf"\g<0>{NO_PATH_HTTP}\n", config, flags=re.MULTILINE)
    config = re.sub(rf"^backend grpc-{ROUTER}\n", rf"\g<0>{NO_PATH_GRPC}\n", config, flags=re.MULTILINE)
    table = (
        r"\1    stick-table type ipv6 size 100k expire 60s store conn_cur" + "\n"
        "    tcp-request connection track-sc0 src" + "\n"
        f"    tcp-request connection reject if {{ sc0_conn_cur gt {connections // 2} }}\n"
    )
    return re.sub(r"^(frontend (?:http|grpc)_frontend\n)", table, config, flags=re.MULTILINE)


def connections() -> int:
    """As many as this process may open files for: HAProxy counts two and a half for each (the half is splice's)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return CONNECTIONS if hard == resource.RLIM_INFINITY else min(CONNECTIONS, (hard - OWN_FILES) // 3)


def amend(file: Path, reload: bool) -> None:
    """In place, since Serve knows its HAProxy processes by this file's name, and as a whole: another process may start
    meanwhile. A file that Serve has not written again since stays as it is."""
    config = file.read_text()
    if MARK in config:
        return
    config = MARK + amended(config, error_page(file.parent), connections())
    last = file.with_name(file.name + LAST)
    # Of a dead HAProxy's successor Serve's first configuration knows no router, until the first reload.
    if not reload and last.exists() and not ROUTERS.search(config):
        config = last.read_text()
    write(last, config)
    write(file, config)


def write(file: Path, text: str) -> None:
    scratch = file.with_name(f"{file.name}.{os.getpid()}")
    scratch.write_text(text)
    scratch.replace(file)


def watch(program: str, config: Path) -> None:
    """Starts what stands in for this process where it dies."""
    actor = os.getppid()
    raylet = Path(f"/proc/{actor}/stat").read_text().rpartition(")")[2].split()[1]
    watcher = Path(__file__).with_name("haproxy_stand_in.py")
    command = [sys.executable, "-IS", str(watcher), str(os.getpid()), raylet, program, f"--config={config}"]
    none = subprocess.DEVNULL
    # In a session of its own: the raylet kills all of a dead worker's process group.
    subprocess.Popen(command, stdin=none, stdout=none, stderr=none, start_new_session=True)


def main(arguments: list[str]) -> None:
    program, *rest = arguments
    if "-f" in rest:
        config = Path(rest[rest.index("-f") + 1])
        amend(config, reload="-sf" in rest)
        watch(program, config)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    # This process becomes HAProxy: Serve compares the process that it started with the one that answers.
    os.execv(program, [program, "-dS", *rest])


if __name__ == "__main__":
    main(sys.argv[1:])
