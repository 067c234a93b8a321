"""A small Hub on 127.0.0.1 which speaks the protocol as `huggingface_hub` uses it, counts, and misbehaves on request.

Large files (safetensors, parquet) are redirected to a second port, as the real Hub redirects them to another host: the
client must not take its token along. `hub.faults[path] = Fault(...)` makes one path fail: the path of a request without
its query, and `/cdn/<SHA-256>` on the second port (`cdn_path`).
"""

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Fault:
    """How a path misbehaves, `times` times; the first of these that is set."""

    status: int | None = None
    body: bytes | None = None  # in place of the file; its length should be the same, or the client sees it
    cut_after: int | None = None  # promise the whole body, send this much of it, hang up
    delay: float = 0.0  # seconds of silence before the answer
    times: int = 1_000


@dataclass
class Repository:
    files: dict[str, bytes]
    private: bool = False
    gated: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=dict)  # beside main


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]  # by name in lower case
    file: str | None = None  # what was sent
    sent: int = 0  # bytes of it


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".parquet"))


def cdn_path(content: bytes) -> str:
    return f"/cdn/{hashlib.sha256(content).hexdigest()}"


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer:
    """`with HubServer() as hub`; `hub.url` is for HF_ENDPOINT, `hub.requests` what was asked."""

    token = "hf_theTokenOfTheTests"

    def __init__(self):
        self.repositories: dict[str, Repository] = {}  # "models/owner/name" or "datasets/owner/name"
        self.faults: dict[str, Fault] = {}
        self.large: dict[str, tuple[str, bytes]] = {}  # what the second port serves, by SHA-256
        self.requests: list[Request] = []
        self.commit = COMMIT
        handler = type("Handler", (_Handler,), {"hub": self})
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self.url, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def __enter__(self):
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def fetched(self):
        """The files whose bodies were sent, with the number of bytes."""
        return [(request.file, request.sent) for request in self.requests if request.file and request.method == "GET"]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        path = unquote(urlsplit(self.path).path)
        self.request_seen = Request(self.command, path, {name.lower(): value for name, value in self.headers.items()})
        if path != "/api/agent-harnesses":  # the client asks for this once a day, for its own statistics
            self.hub.requests.append(self.request_seen)
        fault = self.hub.faults.get(path, Fault(times=0))
        if fault.times == 0 or (self.command == "HEAD" and not fault.status):
            fault = Fault()  # none
        fault.times -= 1
        time.sleep(fault.delay)
        if path == "/api/agent-harnesses":
            self._send(200, b"{}", {})
        elif fault.status is not None:
            self._send(fault.status, b"broken", {})
        elif path.startswith("/cdn/"):
            self.request_seen.file, content = self.hub.large[path.removeprefix("/cdn/")]
            self._send_file(content, {}, fault)
        elif path.startswith("/api/"):
            self._describe(path.removeprefix("/api/"), fault)
        else:
            # Split before unquoting: a revision may hold slashes, which the client has quoted.
            repository, _, rest = urlsplit(self.path).path.strip("/").partition("/resolve/")
            revision, _, name = map(unquote, rest.partition("/"))
            key = repository if repository.startswith("datasets/") else f"models/{repository}"
            self._resolve(key, revision, name, fault)

    def _find(self, key, revision):
        """The repository, or None once a refusal was sent."""
        repository = self.hub.repositories.get(key)
        authorization = self.headers.get("Authorization")
        known = authorization == f"Bearer {self.hub.token}"
        if authorization and not known:
            self._send(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repository is None or (repository.private and not known):
            # The real Hub does not tell strangers which repositories exist.
            error = {"X-Error-Code": "RepoNotFound"} if known else {"X-Error-Message": "Invalid username or password."}
            self._send(404 if known else 401, b"", error)
        elif revision not in ("main", self.hub.commit, *repository.branches):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif repository.gated and not known:
            self._send(401, b"", {"X-Error-Code": "GatedRepo", "X-Repo-Commit": self.hub.commit})
        else:
            return repository
        return None

    def _commit(self, revision, repository):
        return git_hash(revision.encode()) if revision in repository.branches else self.hub.commit

    def _describe(self, path, fault):
        key, _, revision = path.partition("/revision/")
        repository = self._find(key, revision or "main")
        if repository is None:
            return
        siblings, commit = [], self._commit(revision, repository)
        for name, content in repository.branches.get(revision, repository.files).items():
            file = {"rfilename": name, "size": len(content), "blobId": git_hash(content)}
            if is_large(name):
                sha256 = hashlib.sha256(content).hexdigest()
                file["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
            siblings.append(file)
        body = json.dumps({"id": key.partition("/")[2], "sha": commit, "siblings": siblings}).encode()
        self._send_file(body, {"Content-Type": "application/json"}, fault)

    def _resolve(self, key, revision, name, fault):
        repository = self._find(key, revision)
        if repository is None:
            return
        common = {"X-Repo-Commit": self._commit(revision, repository)}
        content = repository.branches.get(revision, repository.files).get(name)
        if content is None:
            self._send(404, b"", common | {"X-Error-Code": "EntryNotFound"})
        elif is_large(name):
            sha256 = hashlib.sha256(content).hexdigest()
            linked = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
            self.hub.large[sha256] = (name, content)
            location = {"Location": f"{self.hub.cdn}/cdn/{sha256}?signature=secret"}
            self._send(302, b"", common | linked | location)
        else:
            self.request_seen.file = name
            self._send_file(content, common | {"ETag": f'"{git_hash(content)}"'}, fault)

    def _send_file(self, content, headers, fault):
        content = content if fault.body is None else fault.body
        start, status = 0, 200
        if wanted := self.headers.get("Range"):
            start, status = int(wanted.removeprefix("bytes=").rstrip("-")), 206
            headers = headers | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self._send(status, content[start:], headers | {"Accept-Ranges": "bytes"}, fault.cut_after)

    def _send(self, status, body, headers, cut_after=None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            body = body[:cut_after]
            self.wfile.write(body)
            self.request_seen.sent = len(body)
        if cut_after is not None:
            self.close_connection = True
