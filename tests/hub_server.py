"""A model hub on 127.0.0.1 for the real huggingface_hub client: lists, downloads with ranges, uploads and commits."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Files of the server and the requests that it received.

    Attributes:
        files: repository -> path -> content. plain: paths on the server that are no repository's.
        claimed: path in a repository -> the SHA-256 that is stated of it where that is not the content's.
        closed: repositories that want the token ``hf_good``.
        stall: after so many bytes of a file nothing more comes, until ``stall`` is None.
        requests: method, path and headers (``Capitalised-Names``) of each request.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.plain: dict[str, bytes] = {}
        self.claimed: dict[str, str] = {}
        self.closed: set[str] = set()
        self.stall: int | None = None
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.uploads: dict[str, bytes] = {}
        self.stalled, self.released = threading.Event(), threading.Event()
        self.address = ""

    def sha256(self, path: str, content: bytes) -> str:
        return self.claimed.get(path, hashlib.sha256(content).hexdigest())

    def asked(self, method: str, end: str) -> list[dict[str, str]]:
        """Headers of the requests of a method for paths of an end."""
        return [headers for asked, path, headers in self.requests if asked == method and path.endswith(end)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._write(body)

    def _write(self, body: bytes) -> None:
        limit = self.hub.stall
        if limit is not None and len(body) > limit:
            self.wfile.write(body[:limit])
            self.wfile.flush()
            self.hub.stalled.set()
            self.hub.released.wait(60)
            self.close_connection = True
        else:
            self.wfile.write(body)

    def _json(self, value: object, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refused(self, repository: str) -> bool:
        known = repository in self.hub.files
        allowed = repository not in self.hub.closed or self.headers.get("Authorization") == "Bearer hf_good"
        if known and allowed:
            return False
        self._answer(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        return True

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.requests.append((self.command, path, {name.title(): value for name, value in self.headers.items()}))
        if path in self.hub.plain:
            self._answer(200, self.hub.plain[path])
        elif path.startswith("/api/models/"):
            self._list("/".join(path.split("/")[3:5]))
        elif "/resolve/" in path:
            repository, _, rest = path[1:].partition("/resolve/")
            self._file(repository, rest.partition("/")[2])
        else:
            self._answer(404)

    do_HEAD = do_GET

    def _list(self, repository: str) -> None:
        if self._refused(repository):
            return
        siblings = []
        for name, content in self.hub.files[repository].items():
            lfs = {"sha256": self.hub.sha256(name, content), "size": len(content), "pointerSize": 134}
            siblings.append({"rfilename": name, "size": len(content), "blobId": "0" * 40, "lfs": lfs})
        self._json({"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings})

    def _file(self, repository: str, name: str) -> None:
        if self._refused(repository):
            return
        if name not in self.hub.files[repository]:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = self.hub.files[repository][name]
        tag = f'"{self.hub.sha256(name, content)}"'
        headers = {"ETag": tag, "X-Linked-ETag": tag, "X-Linked-Size": str(len(content)), "X-Repo-Commit": COMMIT}
        span = self.headers.get("Range")
        if span is None:
            self._answer(200, content, headers)
            return
        start = int(span.removeprefix("bytes=").partition("-")[0])
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._answer(206, content[start:], headers)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_PUT(self) -> None:
        self.hub.requests.append(("PUT", self.path, {name.title(): value for name, value in self.headers.items()}))
        self.hub.uploads[self.path.rpartition("/")[2]] = self._body()
        self._answer(200)

    def do_POST(self) -> None:
        path, body = unquote(urlparse(self.path).path), self._body()
        self.hub.requests.append(("POST", path, {name.title(): value for name, value in self.headers.items()}))
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != "Bearer hf_good":
            self._answer(401, b"", {"X-Error-Message": "Invalid username or password."})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked['organization']}/{asked['name']}"
            self.hub.files.setdefault(repository, {})
            self._json({"url": f"{self.hub.address}/{repository}"})
        elif "/preupload/" in path:
            modes = [(file["path"], file["path"].endswith(".safetensors")) for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "lfs" if large else "regular"} for name, large in modes]
            self._json({"files": [{**file, "shouldIgnore": False} for file in files]})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**asked, "actions": {"upload": {"href": f"{self.hub.address}/upload/{asked['oid']}"}}}
                for asked in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self._commit("/".join(path.split("/")[3:5]), body)
        else:
            self._answer(404)

    def _commit(self, repository: str, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.hub.files[repository][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.hub.files[repository][value["path"]] = self.hub.uploads[value["oid"]]
        address = f"{self.hub.address}/{repository}/commit/{COMMIT}"
        self._json({"success": True, "commitOid": COMMIT, "commitUrl": address})


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub

    def handle_error(self, *_: object) -> None:
        """Clients are killed on purpose."""


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub without repositories, for as long as the block runs."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.hub = hub = Hub()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
