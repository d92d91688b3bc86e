"""A small Hub on this machine: whoami, repositories, Git LFS and commits over real HTTP, with faults to order."""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WRITE, READ, FINE, WRONG = "hf_write0token", "hf_read0token", "hf_fine0token", "hf_wrong0token"
LFS_FROM_BYTES = 10_000


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


class Hub:
    """`repos` by name; `puts` are the sizes of large files that came in whole; `hold` stops the next one half-way."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.puts: list[int] = []
        self.requests: list[str] = []
        self.tokens_seen: set[str] = set()
        self.fine_for = "me/allowed"
        self.hold_after: int | None = None
        """After so many large files the next is read half-way and never answered."""
        self.holding, self.released = threading.Event(), threading.Event()
        self.lose_files = False
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def whoami(self, token: str) -> dict[str, Any] | None:
        roles = {WRITE: "write", READ: "read", FINE: "fineGrained"}
        if token not in roles:
            return None
        access: dict[str, Any] = {"displayName": "test", "role": roles[token]}
        if token == FINE:
            entity = {"type": "model", "name": self.fine_for}
            access["fineGrained"] = {"scoped": [{"entity": entity, "permissions": ["repo.content.read", "repo.write"]}]}
        orgs = [{"name": "team", "roleInOrg": "write"}, {"name": "club", "roleInOrg": "read"}]
        return {"type": "user", "name": "me", "orgs": orgs, "auth": {"type": "access_token", "accessToken": access}}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def token(self) -> str:
            return self.headers.get("authorization", "").removeprefix("Bearer ")

        def body(self) -> bytes:
            if "chunked" in self.headers.get("transfer-encoding", ""):
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("content-length", 0)))

        def say(self, code: int, content: Any = None, **headers: str) -> None:
            data = json.dumps(content).encode() if content is not None else b""
            self.send_response(code)
            for name, value in {
                **headers,
                "content-length": str(len(data)),
                "content-type": "application/json",
            }.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def me(self) -> dict[str, Any] | None:
            hub.requests.append(f"{self.command} {self.path}")
            hub.tokens_seen.add(self.token())
            return hub.whoami(self.token())

        def do_GET(self) -> None:
            me = self.me()
            if self.path == "/api/whoami-v2":
                self.say(200, me) if me else self.say(401, {"error": "Invalid token"})
                return
            name = self.path.partition("?")[0].removeprefix("/api/models/").removesuffix("/revision/main")
            repo = hub.repos.get(name)
            if repo is None or (repo.private and not me):
                self.say(404, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound"})
                return
            files = [{"rfilename": path, "size": len(data)} for path, data in repo.files.items()]
            self.say(200, {"id": name, "private": repo.private, "sha": "0" * 40, "siblings": files, "tags": []})

        def do_POST(self) -> None:
            me, data = self.me(), self.body()
            if self.path == "/api/validate-yaml":
                self.say(200, {"errors": [], "warnings": []})
                return
            if not me:
                self.say(401, {"error": "Invalid token"})
                return
            if me["auth"]["accessToken"]["role"] == "read":
                self.say(403, {"error": "Forbidden"})
                return
            if self.path == "/api/repos/create":
                self.create(json.loads(data))
            elif self.path.endswith("/preupload/main"):
                self.preupload(json.loads(data))
            elif self.path.endswith(".git/info/lfs/objects/batch"):
                self.batch(json.loads(data))
            elif self.path.endswith("/commit/main"):
                self.commit([json.loads(line) for line in data.splitlines()])
            else:
                self.say(404, {"error": "no such place"})

        def create(self, asked: dict[str, Any]) -> None:
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in hub.repos:
                self.say(409, {"error": "exists", "url": f"{hub.url}/{name}"})
                return
            private = asked.get("private") or asked.get("visibility") == "private"
            hub.repos[name] = Repo(bool(private))
            self.say(200, {"url": f"{hub.url}/{name}", "name": name, "id": name})

        def preupload(self, asked: dict[str, Any]) -> None:
            modes = [
                {"path": one["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if one["size"] >= LFS_FROM_BYTES else "regular"}
                for one in asked["files"]
            ]  # fmt: skip
            self.say(200, {"files": modes})

        def batch(self, asked: dict[str, Any]) -> None:
            objects = []
            for one in asked["objects"]:
                entry: dict[str, Any] = {"oid": one["oid"], "size": one["size"]}
                if one["oid"] not in hub.objects:
                    entry["actions"] = {"upload": {"href": f"{hub.url}/lfs/{one['oid']}", "header": {}}}
                objects.append(entry)
            self.say(200, {"transfer": "basic", "objects": objects})

        def do_PUT(self) -> None:
            if hub.hold_after is not None and len(hub.puts) >= hub.hold_after:
                self.rfile.read(1000)
                hub.holding.set()
                hub.released.wait(60)
                self.close_connection = True
                return
            data = self.body()
            oid = self.path.rsplit("/", 1)[-1]
            assert hashlib.sha256(data).hexdigest() == oid
            hub.objects[oid] = data
            hub.puts.append(len(data))
            self.say(200)

        def commit(self, lines: list[dict[str, Any]]) -> None:
            name = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
            repo = hub.repos[name]
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    repo.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repo.files[value["path"]] = hub.objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    repo.files.pop(value["path"])
                else:
                    repo.commits.append(value["summary"])
            if hub.lose_files:
                repo.files.popitem()
            self.say(200, {"commitUrl": f"{hub.url}/{name}/commit/1", "commitOid": "1" * 40})

    return Handler
