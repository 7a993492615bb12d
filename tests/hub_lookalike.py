"""A Hub on loopback, for tests: a real HTTP server with the Hub's routes, headers and error codes, that serves local
folders, counts what it serves, and misbehaves on request.

    with HubLookalike() as hub:
        commit = hub.add("org/model", folder)
        hub.fail(429, times=1, Retry_After="1")
        hub.cut("model.safetensors", after=1000)

What is as on the Hub: a repository's files as siblings and as a tree, a commit of forty hex digits for every
revision, an etag that is git's blob id or, for what LFS holds, the content's sha256; ranges; X-Error-Code; and, where
`cdn` is set, the redirect of LFS files to another host, which must not see the token.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.hub_records import Content, Cut, Failure, Repository, Request, mapped, sibling, tree_entry

HOST = "127.0.0.1"
CDN_HOST = "127.0.0.2"  # huggingface_hub follows a redirect to the same host by itself, whatever its port


class HubLookalike:
    """`url` is for HF_ENDPOINT. `token`: what every request must carry. `cdn`: LFS files come from another port."""

    def __init__(self, token: str | None = None, cdn: bool = False) -> None:
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.cdn_requests: list[Request] = []
        self.blobs: dict[str, Content] = {}
        self._failures: list[Failure] = []
        self._cuts: list[Cut] = []
        self._lock = threading.Lock()
        self._server = _serve(self, _HubHandler, HOST)
        self._cdn = _serve(self, _CdnHandler, CDN_HOST) if cdn else None

    def __enter__(self) -> HubLookalike:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._server.server_address[1]}"

    @property
    def cdn_url(self) -> str | None:
        return f"http://{CDN_HOST}:{self._cdn.server_address[1]}" if self._cdn else None

    def stop(self) -> None:
        for server in (self._server, self._cdn):
            if server:
                server.shutdown()
                server.server_close()
                server.close_connections()

    def add(self, repo: str, folder: Path, revision: str = "main") -> str:
        """Makes the folder's files a commit of the repository, which `revision` then stands for; the commit."""
        paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        files = {name: Content.of(path) for name, path in paths.items()}
        listing = "".join(f"{name} {content.etag}\n" for name, content in files.items())
        commit = hashlib.sha1(f"{repo}\n{listing}".encode()).hexdigest()
        repository = self.repositories.setdefault(repo, Repository())
        repository.revisions[revision] = commit
        repository.commits[commit] = files
        self.blobs.update({content.sha256: content for content in files.values()})
        return commit

    def fail(self, status: int, times: int = 1 << 30, path: str = "", **headers: str) -> None:
        """`headers` with underscores for hyphens: Retry_After="7"."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self._failures.append(Failure(status, times, path, named))

    def cut(self, file: str, after: int, times: int = 1, reset: bool = False) -> None:
        self._cuts.append(Cut(file, after, times, reset))

    def asked(self, file: str, method: str = "GET") -> list[Request]:
        """The requests for a file, at whatever host."""
        held = {blob.sha256 for blob in self.blobs.values() if blob.path.name == file}
        return [
            request
            for request in [*self.requests, *self.cdn_requests]
            if request.method == method and (request.file == file or request.file in held)
        ]

    def served(self, file: str) -> int:
        """Bytes of a file's content sent so far."""
        return sum(request.bytes for request in self.asked(file) if request.status in {200, 206})

    def next_failure(self, path: str) -> Failure | None:
        return self._take(self._failures, lambda failure: failure.path in path)

    def next_cut(self, file: str) -> Cut | None:
        return self._take(self._cuts, lambda cut: cut.file == file)

    def _take(self, planned: list[Any], fits: Callable[[Any], bool]) -> Any:
        with self._lock:
            for each in planned:
                if each.times > 0 and fits(each):
                    each.times -= 1
                    return each
        return None


class _Server(ThreadingHTTPServer):
    """Knows its connections, which clients keep open, so that it can end them as a process that dies would."""

    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        self._connections: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def close_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().close_request(request)

    def close_connections(self) -> None:
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _serve(hub: HubLookalike, handler: type[_Handler], host: str) -> _Server:
    server = _Server((host, 0), type(handler.__name__, (handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    hub: HubLookalike
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        raise NotImplementedError

    def log_to(self) -> list[Request]:
        return self.hub.requests

    def note(self, status: int, sent: int) -> None:
        authorization, asked_range = self.headers.get("Authorization"), self.headers.get("Range")
        path = unquote(urlsplit(self.path).path)
        self.log_to().append(Request(self.command, path, status, sent, authorization, asked_range))

    def send(self, status: int, body: bytes | memoryview = b"", headers: dict[str, str] | None = None) -> None:
        body = b"" if self.command == "HEAD" else body
        self.note(status, len(body))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, code: str | None = None, message: str = "", **headers: str) -> None:
        named = {"X-Error-Code": code, "X-Error-Message": message}
        body = json.dumps({"error": message}).encode()
        self.send(status, body, {**{name: value for name, value in named.items() if value}, **headers})

    def send_content(self, content: Content, headers: dict[str, str]) -> None:
        data, status = mapped(content.path), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            start, stop = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
            headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
            data, status = data[start:stop], 206
        headers = {"Accept-Ranges": "bytes", **headers, "Content-Length": str(len(data))}
        cut = self.hub.next_cut(content.path.name) if self.command == "GET" else None
        if cut is None:
            self.send(status, data, headers)
        else:
            self.send_part(status, data, headers, cut)

    def send_part(self, status: int, data: memoryview, headers: dict[str, str], cut: Cut) -> None:
        self.note(status, cut.after)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: cut.after])
        self.wfile.flush()
        if cut.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        self.close_connection = True


class _CdnHandler(_Handler):
    """Where the Hub's redirects lead: a blob by its sha256, to whom asks."""

    def log_to(self) -> list[Request]:
        return self.hub.cdn_requests

    def answer(self) -> None:
        content = self.hub.blobs.get(self.path.rsplit("/", 1)[-1])
        if content is None:
            self.send(404)
        else:
            self.send_content(content, {"ETag": f'"{content.etag}"'})


class _HubHandler(_Handler):
    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        failure = self.hub.next_failure(path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^?]+))?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+|refs/[^/]+/[^/]+)/(.+)", path)
        if failure:
            self.refuse(failure.status, message="told to", **failure.headers)
        elif self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.refuse(401, message="Invalid username or password.")
        elif api:
            self.answer_api(api[1], api[2], api[3] or "main")
        elif resolve:
            self.answer_file(resolve[1], resolve[2], resolve[3])
        else:
            self.refuse(404, message="no such route")

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, Content]] | None:
        """The commit and its files; None where the request has been refused."""
        repository = self.hub.repositories.get(repo)
        if repository is None:
            self.refuse(404, "RepoNotFound", "Repository not found")
            return None
        commit = repository.revisions.get(revision, revision)
        if commit not in repository.commits:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return commit, repository.commits[commit]

    def answer_api(self, repo: str, route: str | None, revision: str) -> None:
        found = self.find(repo, revision)
        if found is None:
            return
        commit, files = found
        if route == "tree":
            answer: Any = [tree_entry(name, content) for name, content in files.items()]
        else:
            blobs = "blobs=" in self.path
            siblings = [sibling(name, content) if blobs else {"rfilename": name} for name, content in files.items()]
            answer = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "private": False}
        self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def answer_file(self, repo: str, revision: str, name: str) -> None:
        found = self.find(repo, revision)
        if found is None:
            return
        commit, files = found
        headers = {"X-Repo-Commit": commit}
        if self.hub.repositories[repo].gated:
            self.refuse(403, "GatedRepo", "Access to this model is restricted", **headers)
            return
        if name not in files:
            self.refuse(404, "EntryNotFound", "Entry not found", **headers)
            return
        content = files[name]
        headers["ETag"] = f'"{content.etag}"'
        if content.lfs:
            headers |= {"X-Linked-Etag": f'"{content.sha256}"', "X-Linked-Size": str(content.size)}
            if self.hub.cdn_url:
                self.send(302, b"", {**headers, "Location": f"{self.hub.cdn_url}/{content.sha256}"})
                return
        self.send_content(content, headers)
