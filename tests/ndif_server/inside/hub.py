"""A model hub on loopback: configurations and tokenizers for everyone, weights only for the bearer of its token.

usage: python hub.py PORT TOKEN NAME=DIRECTORY ...

The three routes that huggingface_hub, transformers, nnsight and NDIF use:
    /api/models/NAME[/revision/REVISION]     the model's record
    /api/models/NAME/tree/REVISION[/PATH]    its files
    /NAME/resolve/REVISION/PATH              one file
"""

import hashlib
import json
import re
import shutil
import struct
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import prod
from pathlib import Path
from urllib.parse import unquote, urlsplit

WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt")


def files(directory: Path) -> dict[str, Path]:
    """Every file of a model by its name in it."""
    return {str(p.relative_to(directory)): p for p in sorted(directory.rglob("*")) if p.is_file()}


def version(*paths: Path) -> str:
    """A stand-in for a git hash: changes when a file does."""
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    return hashlib.sha1(repr(stats).encode()).hexdigest()


def parameters(path: Path) -> dict[str, int]:
    """Numbers of parameters by dtype, from the header of a safetensors file."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    counts = dict.fromkeys((entry["dtype"] for entry in header.values()), 0)
    for entry in header.values():
        counts[entry["dtype"]] += prod(entry["shape"])
    return counts


def record(name: str, directory: Path) -> dict:
    """What the hub tells of a model."""
    found = files(directory)
    counts: dict[str, int] = {}
    for path in found.values():
        if path.suffix == ".safetensors":
            counts |= {k: counts.get(k, 0) + n for k, n in parameters(path).items()}
    return {
        "id": name,
        "modelId": name,
        "sha": version(*found.values()),
        "private": False,
        "gated": False,
        "tags": ["transformers", "safetensors", "text-generation"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "siblings": [{"rfilename": each} for each in found],
        "safetensors": {"parameters": counts, "total": sum(counts.values())},
    }


class Hub(BaseHTTPRequestHandler):
    """One request; the class holds what is served."""

    protocol_version = "HTTP/1.1"
    token: str
    models: dict[str, Path]

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/ping":
            self.send_json("here")
        elif m := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/.*)?", path):
            self.send_model(m[1], lambda directory: self.send_json(record(m[1], directory)))
        elif m := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+/?(.*)", path):
            self.send_model(m[1], lambda directory: self.send_tree(directory, m[2]))
        elif m := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self.send_model(m[1], lambda directory: self.send_file(directory, m[2]))
        else:
            self.refuse(404, "RepoNotFound")

    do_HEAD = do_GET

    def send_model(self, name, send) -> None:
        if name in self.models:
            send(self.models[name])
        else:
            self.refuse(404, "RepoNotFound")

    def send_tree(self, directory: Path, below: str) -> None:
        found = {
            k: p for k, p in files(directory).items() if k == below or k.startswith(below and f"{below}/")
        }
        if below and not found:
            return self.refuse(404, "EntryNotFound")
        rows = [
            {"type": "file", "path": k, "oid": version(p), "size": p.stat().st_size} for k, p in found.items()
        ]
        return self.send_json(rows)

    def send_file(self, directory: Path, name: str) -> None:
        found = files(directory)
        if name not in found:
            return self.refuse(404, "EntryNotFound")
        if name.endswith(WEIGHTS) and self.headers.get("Authorization") != f"Bearer {self.token}":
            return self.refuse(403, "GatedRepo")
        path = found[name]
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        size = path.stat().st_size
        first = int(asked[1] or 0) if asked else 0
        last = int(asked[2] or size - 1) if asked else size - 1
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{version(path)}"')
        self.send_header("X-Repo-Commit", version(*found.values()))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        if self.command == "GET":
            self.copy(path, first, last)
        return None

    def copy(self, path: Path, first: int, last: int) -> None:
        with path.open("rb") as file:
            file.seek(first)
            if last + 1 == path.stat().st_size:
                shutil.copyfileobj(file, self.wfile, 1 << 20)
            else:
                self.wfile.write(file.read(last - first + 1))

    def send_json(self, value) -> None:
        self.send_body(200, json.dumps(value).encode())

    def refuse(self, status: int, code: str) -> None:
        self.send_body(status, json.dumps({"error": code}).encode(), {"X-Error-Code": code})

    def send_body(self, status: int, body: bytes, headers=None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def main(port: str, token: str, *models: str) -> None:
    Hub.token = token
    Hub.models = {name: Path(directory) for name, _, directory in (model.partition("=") for model in models)}
    ThreadingHTTPServer(("127.0.0.1", int(port)), Hub).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
