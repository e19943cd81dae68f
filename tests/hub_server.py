"""A small server that speaks the Hugging Face Hub's protocol, for one repository, with faults on request."""

import contextlib
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclasses.dataclass
class Hub:
    """What is served, and what was asked for.

    token: what weights and configs need. gated: its licence was not accepted. cut: bytes after which the first
    answer of each weight file ends. fails: status of every answer. wrong_sizes: file → size that the list states.
    asked: (method, path, Range) of every request.
    """

    folder: Path
    name: str = "org/tiny"
    revisions: tuple[str, ...] = ("main", "v1")
    token: str | None = None
    gated: bool = False
    cut: int | None = None
    fails: int | None = None
    gone: str | None = None
    wrong_sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    asked: list[tuple[str, str, str | None]] = dataclasses.field(default_factory=list)
    endpoint: str = ""

    def files(self) -> dict[str, bytes]:
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in paths}

    def fetched(self) -> set[str]:
        """Files that were sent whole or from somewhere on."""
        resolved = [path for method, path, part in self.asked if method == "GET" and part != "bytes=0-100000"]
        return {path.split(f"/resolve/{COMMIT}/")[1] for path in resolved if "/resolve/" in path}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, self.headers.get("Range")))
        if self.hub.fails:
            return self.send(b"", status=self.hub.fails)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            return self.describe(*match.groups())
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.send_file(match[3])
        return self.refuse(404, "EntryNotFound")

    def describe(self, name: str, kind: str | None, revision: str | None) -> None:
        """The repository, or the files of a commit."""
        if name != self.hub.name:
            return self.refuse(401, "RepoNotFound")
        if revision not in (None, COMMIT, *self.hub.revisions):
            return self.refuse(404, "RevisionNotFound")
        files = self.hub.files()
        if kind != "tree":
            siblings = [{"rfilename": file} for file in files]
            return self.send_json({"id": name, "sha": COMMIT, "siblings": siblings, "private": False})
        listed = [
            {"type": "file", "oid": digest(data), "size": self.hub.wrong_sizes.get(file, len(data)), "path": file}
            for file, data in files.items()
        ]
        folders = {str(Path(file).parent) for file in files} - {"."}
        self.send_json(listed + [{"type": "directory", "oid": "0" * 40, "path": folder} for folder in folders])

    def send_file(self, name: str) -> None:
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.refuse(401, "GatedRepo")
        if self.hub.gated:
            return self.refuse(403, "GatedRepo")
        if name == self.hub.gone:
            return self.send(b"", status=503)
        data = self.hub.files().get(name)
        if data is None:
            return self.refuse(404, "EntryNotFound")
        headers = {"ETag": f'"{digest(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part is None:
            cut = self.hub.cut if name.endswith(".safetensors") else None
            return self.send(data, headers, cut=cut)
        last = min(int(part[2] or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {part[1]}-{last}/{len(data)}"
        return self.send(data[int(part[1]) : last + 1], headers, 206)

    def refuse(self, status: int, code: str) -> None:
        self.send(b"", {"X-Error-Code": code, "X-Error-Message": code}, status)

    def send_json(self, content) -> None:
        self.send(json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send(self, data: bytes, headers: dict = {}, status: int = 200, cut: int | None = None) -> None:  # noqa: B006
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:cut])
        # Fewer bytes than were announced end the connection.
        self.close_connection = cut is not None


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextlib.contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """The server's address is `hub.endpoint` while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub, server.daemon_threads = hub, True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
