"""A stand-in for the Hugging Face Hub: enough of its protocol for `snapshot_download`, on this machine only."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves `models`, each a directory of files, whose branches and tags all point to one commit.

    Attributes:
        models: the directory of each name such as ``org/model``.
        revisions: the branches, tags and commits of every model.
        gated: names whose files may be listed but not read.
        broken: names for which the Hub answers with an internal error.
        rejected_token: an access token that the Hub calls invalid.
        requests: (method, path, Authorization header) of everything asked about a model.
    """

    daemon_threads = True

    def __init__(self, models: dict[str, Path], gated: set[str], broken: set[str], rejected_token: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models = models
        self.revisions = {"main", "v1.0", COMMIT}
        self.gated = gated
        self.broken = broken
        self.rejected_token = rejected_token
        self.requests: list[tuple[str, str, str | None]] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @contextmanager
    def running(self) -> Iterator["Hub"]:
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            thread.join()
            self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def log_message(self, *_: object) -> None:
        """Stay silent."""

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        is_api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models").strip("/").split("/")
        if len(parts) < 4:  # huggingface_hub asks about itself, too
            self.refuse(404)
            return
        token = self.headers.get("Authorization")
        self.server.requests.append((self.command, path, token))
        if token == f"Bearer {self.server.rejected_token}":
            self.refuse(401, message="Invalid credentials in Authorization header")
            return
        name, what, revision = "/".join(parts[:2]), parts[2], parts[3]
        directory = self.server.models.get(name)
        if name in self.server.broken:
            self.refuse(500)
        elif directory is None:
            self.refuse(401, code="RepoNotFound")  # as the Hub does: a name may be private rather than absent
        elif revision not in self.server.revisions:
            self.refuse(404, code="RevisionNotFound")
        elif is_api and what == "revision":
            siblings = [{"rfilename": file.name} for file in sorted(directory.iterdir())]
            self.send(json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
        elif is_api and what == "tree":
            tree = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": self.etag(file)}
                for file in sorted(directory.iterdir())
            ]
            self.send(json.dumps(tree).encode())
        elif name in self.server.gated:
            self.refuse(403, code="GatedRepo")
        elif (directory / parts[4]).is_file():
            file = directory / parts[4]
            self.send(file.read_bytes(), {"ETag": f'"{self.etag(file)}"', "X-Repo-Commit": COMMIT})
        else:
            self.refuse(404, code="EntryNotFound")

    @staticmethod
    def etag(file: Path) -> str:
        return sha256(file.read_bytes()).hexdigest()[:40]

    def send(self, body: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def refuse(self, status: int, code: str = "", message: str = "refused") -> None:
        self.send(b"", {"X-Error-Code": code, "X-Error-Message": message}, status)
