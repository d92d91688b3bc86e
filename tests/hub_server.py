"""A Hub of one's own: just enough of the Hub's HTTP for data sets, on this machine, counting the bytes it gives out."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

Repository = dict[str, dict[str, bytes]]
"""Files by revision and path."""


class Hub:
    """`repositories` by OWNER/NAME; `asked` are the paths asked for, `given` the bytes of files given out."""

    def __init__(self, repositories: dict[str, Repository]) -> None:
        self.repositories = repositories
        self.asked: list[str] = []
        self.given = 0
        self.token = ""
        """A token without which nothing is given out; empty: everything is public."""


def commit_of(name: str, revision: str) -> str:
    return hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            paths = json.loads(self.rfile.read(length) or b"{}").get("paths", [])
            match = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/([^/]+)", unquote(self.path))
            files = self._files(match.group(1), match.group(2)) if match else None
            if files is None:
                self._send(404, b"{}", {})
                return
            found = [self._entry(path, files[path]) for path in paths if path in files]
            self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

        def _answer(self, *, body: bool) -> None:
            path = unquote(self.path.split("?")[0])
            hub.asked.append(path)
            if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
                return
            for pattern, answer in (
                (r"/api/datasets/([^/]+/[^/]+)(?:/revision/([^/]+))?", self._info),
                (r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", self._tree),
                (r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
            ):
                if match := re.fullmatch(pattern, path):
                    answer(body, *match.groups())
                    return
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

        def _files(self, name: str, revision: str | None) -> dict[str, bytes] | None:
            repository = hub.repositories.get(name, {})
            by_commit = {commit_of(name, known): files for known, files in repository.items()}
            return repository.get(revision or "main") or by_commit.get(revision or "")

        def _revision(self, name: str, revision: str | None) -> str:
            known = hub.repositories.get(name, {})
            return commit_of(name, revision or "main") if (revision or "main") in known else str(revision)

        def _missing(self, name: str, body: bool) -> None:
            code = "RevisionNotFound" if name in hub.repositories else "RepoNotFound"
            self._send(404, b"{}", {"X-Error-Code": code}, body)

        def _info(self, body: bool, name: str, revision: str | None) -> None:
            files = self._files(name, revision)
            if files is None:
                self._missing(name, body)
                return
            siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
            found = {"id": name, "sha": self._revision(name, revision), "siblings": siblings, "private": False,
                     "tags": [], "downloads": 0, "likes": 0}  # fmt: skip
            self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"}, body)

        def _tree(self, body: bool, name: str, revision: str, folder: str | None) -> None:
            files = self._files(name, revision)
            if files is None:
                self._missing(name, body)
                return
            lead = f"{folder}/" if folder else ""
            entries = [self._entry(path, content) for path, content in files.items() if path.startswith(lead)]
            self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"}, body)

        @staticmethod
        def _entry(path: str, content: bytes) -> dict[str, Any]:
            return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

        def _file(self, body: bool, name: str, revision: str, path: str) -> None:
            files = self._files(name, revision)
            if files is None or path not in files:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound" if files is not None else "RepoNotFound"}, body)
                return
            content, status, more = files[path], 200, {}
            if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                start, end = int(span.group(1)), int(span.group(2) or len(content) - 1)
                more = {"Content-Range": f"bytes {start}-{min(end, len(content) - 1)}/{len(content)}"}
                content, status = content[start : end + 1], 206
            headers = {"ETag": f'"{hashlib.sha1(files[path]).hexdigest()}"', "Accept-Ranges": "bytes",
                       "X-Repo-Commit": self._revision(name, revision), **more}  # fmt: skip
            hub.given += len(content) if body else 0
            self._send(status, content, headers, body)

        def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool = True) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

    return Handler


@contextmanager
def serving(repositories: dict[str, Repository]) -> Iterator[tuple[Hub, str]]:
    """(the hub, its address) while the block runs."""
    hub = Hub(repositories)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
