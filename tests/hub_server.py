"""A Hub of one repository over HTTP, as much of it as the real client needs to upload and download plain files."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REPO = "org/name"


class HubServer(ThreadingHTTPServer):
    """What it holds, and the files of each commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.commits: list[list[str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def head(self) -> str:
        return f"{len(self.commits) + 1:040x}"


@contextmanager
def hub_server() -> Iterator[HubServer]:
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args: object) -> None: ...

    def _say(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, files = self.path.partition("?")[0], self.server.files
        if path.startswith(f"/api/models/{REPO}/tree"):
            self._say([{"type": "file", "path": n, "size": len(d), "oid": _sha(d)} for n, d in files.items()])
        elif path.startswith(f"/api/models/{REPO}"):
            siblings = [{"rfilename": n, "size": len(d), "blobId": _sha(d)} for n, d in files.items()]
            self._say(
                {"id": REPO, "sha": self.server.head, "private": False, "tags": [], "siblings": siblings}
            )
        elif path.startswith(f"/{REPO}/resolve/"):
            data = files[path.split("/", 5)[5]]
            self._say(data, headers={"ETag": f'"{_sha(data)}"', "X-Repo-Commit": self.server.head})
        else:
            self._say({"error": "not found"}, 404)

    def do_POST(self) -> None:
        body = self._body()
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            self._say({"files": modes, "commitOid": self.server.head})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            new = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
            self.server.files |= {name: base64.b64decode(content) for name, content in new.items()}
            self.server.commits.append(sorted(new))
            url = f"{self.server.url}/{REPO}/commit/{self.server.head}"
            self._say({"commitUrl": url, "commitOid": self.server.head, "success": True})
        elif self.path == "/api/validate-yaml":
            self._say({"errors": [], "warnings": []})
        else:
            self._say({}, 404)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)


def _sha(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
