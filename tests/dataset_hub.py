"""A stand-in for the dataset repositories of the Hugging Face Hub, on loopback, in memory: what its own client asks.

Uploads go the way of LFS, for the hub's other way (xet) is a service of its own: HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_thetokenofowner"


def oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """One request; the server holds `repos` (name -> "private", "files"), `objects`, `asked`, and `refuse`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        hub.asked.append((self.command, path))
        if (status := hub.refuse(self.command, path)) is not None:
            return self.send(status, b"{}")
        for pattern, method in ROUTES.items():
            verb, _, form = pattern.partition(" ")
            if self.command in verb.split("|") and (found := re.fullmatch(form, path)):
                return method(self, *found.groups())
        return self.send(404, b"{}")

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def repo(self, name):
        """A repository, if whoever asks may see it; else the answer is sent."""
        found = self.server.repos.get(name)
        if found is None or (found["private"] and not self.known):
            self.send(404 if self.known else 401, b"{}", {"X-Error-Code": "RepoNotFound"})
            return None
        return found

    def create(self):
        given = json.loads(self.body)
        name = (
            f"{given['organization']}/{given['name']}"
            if given.get("organization")
            else f"owner/{given['name']}"
        )
        if not self.known or not name.startswith("owner/"):
            return self.send(403 if self.known else 401, b"{}")
        if name in self.server.repos:
            return self.json({"url": f"{self.server.url}/datasets/{name}"}, status=409)
        private = bool(given.get("private")) or given.get("visibility") == "private"
        self.server.repos[name] = {"private": private, "files": {}}
        return self.json({"url": f"{self.server.url}/datasets/{name}"})

    def record(self, name, _=None):
        if repo := self.repo(name):
            files = [{"rfilename": each} for each in repo["files"]]
            self.json(
                {
                    "id": name,
                    "sha": commit_of(repo),
                    "private": repo["private"],
                    "siblings": files,
                    "tags": [],
                }
            )

    def yaml(self):
        self.json({"errors": [], "warnings": []})

    def preupload(self, name):
        """As the hub: text goes into the commit, bytes go to where large files are; with what is there already."""
        if (repo := self.repo(name)) is None:
            return
        rows = []
        for each in json.loads(self.body)["files"]:
            sample = base64.b64decode(each["sample"])
            there = repo["files"].get(each["path"])
            mode = "lfs" if b"\0" in sample or not sample.isascii() else "regular"
            rows.append(
                {"path": each["path"], "uploadMode": mode, "shouldIgnore": False, "oid": there and oid(there)}
            )
        self.json({"files": rows})

    def batch(self, name):
        objects = []
        for each in json.loads(self.body)["objects"]:
            new = each["oid"] not in self.server.objects
            href = f"{self.server.url}/object/{each['oid']}"
            objects.append(each | ({"actions": {"upload": {"href": href}}} if new else {}))
        self.json({"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")

    def put(self, sha):
        assert hashlib.sha256(self.body).hexdigest() == sha
        self.server.objects[sha] = self.body
        self.send(200, b"")

    def commit(self, name):
        if (repo := self.repo(name)) is None:
            return
        for row in map(json.loads, self.body.splitlines()):
            value = row["value"]
            if row["key"] == "file":
                repo["files"][value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                repo["files"][value["path"]] = self.server.objects[value["oid"]]
        self.json({"commitUrl": f"{self.server.url}/datasets/{name}/commit/x", "commitOid": commit_of(repo)})

    def tree(self, name, _, below=""):
        """The files and folders below one; of all folders below that where `recursive` is asked for."""
        if (repo := self.repo(name)) is None:
            return
        below, deep = (below or "").strip("/"), "recursive=true" in self.path.lower()
        inside = {k: v for k, v in repo["files"].items() if not below or k.startswith(f"{below}/")}
        if below and not inside:
            return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        start = len(below) + 1 if below else 0
        folders = {k[: start + k[start:].index("/")] for k in inside if "/" in k[start:]}
        if deep:
            folders |= {k[:at] for k in inside for at, c in enumerate(k) if c == "/" and at > start}
        rows = [
            {"type": "directory", "path": each, "oid": oid(each.encode()), "size": 0}
            for each in sorted(folders)
        ]
        shown = {k: v for k, v in inside.items() if deep or "/" not in k[start:]}
        self.json(
            [*rows, *({"type": "file", "path": k, "oid": oid(v), "size": len(v)} for k, v in shown.items())]
        )

    def paths(self, name, _):
        if (repo := self.repo(name)) is None:
            return
        rows = []
        for path in parse_qs(self.body.decode())["paths"]:
            if (data := repo["files"].get(path)) is not None:
                rows.append({"type": "file", "path": path, "oid": oid(data), "size": len(data)})
            elif any(each.startswith(f"{path}/") for each in repo["files"]):
                rows.append({"type": "directory", "path": path, "oid": oid(path.encode()), "size": 0})
        self.json(rows)

    def resolve(self, name, _, path):
        if (repo := self.repo(name)) is None:
            return
        if path not in repo["files"]:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit_of(repo)})
        data, status, more = repo["files"][path], 200, {}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
            status, more = 206, {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            data = data[first : last + 1]
        more |= {
            "ETag": f'"{oid(repo["files"][path])}"',
            "X-Repo-Commit": commit_of(repo),
            "Accept-Ranges": "bytes",
        }
        return self.send(status, data, more)

    def json(self, value, kind="application/json", status=200):
        self.send(status, json.dumps(value).encode(), {"Content-Type": kind})

    def send(self, status, body, headers=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def commit_of(repo) -> str:
    """Changes when a file does."""
    return hashlib.sha1(repr(sorted((k, oid(v)) for k, v in repo["files"].items())).encode()).hexdigest()


NAME = "([^/]+/[^/]+)"
ROUTES = {
    "POST /api/repos/create": Hub.create,
    "POST /api/validate-yaml": Hub.yaml,
    f"POST /api/datasets/{NAME}/preupload/[^/]+": Hub.preupload,
    f"POST /datasets/{NAME}\\.git/info/lfs/objects/batch": Hub.batch,
    "PUT /object/(\\w+)": Hub.put,
    f"POST /api/datasets/{NAME}/commit/[^/]+": Hub.commit,
    f"GET|HEAD /api/datasets/{NAME}(?:/revision/([^/]+))?": Hub.record,
    f"GET /api/datasets/{NAME}/tree/([^/]+)(?:/(.*))?": Hub.tree,
    f"POST /api/datasets/{NAME}/paths-info/([^/]+)": Hub.paths,
    f"GET|HEAD /datasets/{NAME}/resolve/([^/]+)/(.+)": Hub.resolve,
}


@contextmanager
def hub():
    """A running stand-in: `url`, `repos`, `asked` (method and path of each request), `refuse` (what it refuses how)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.repos, server.objects, server.asked, server.refuse = {}, {}, [], lambda method, path: None
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
