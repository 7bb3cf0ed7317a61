"""A local stand-in of a Hugging Face hub: the part of its HTTP API that downloading a model uses.

`GET /api/models/{repo}/revision/{revision}` lists files, `HEAD` and `GET /{repo}/resolve/{commit}/{file}` serve them,
with ETags and byte ranges.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?")
FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass
class Hub:
    """Repositories of one running server, and what was asked of it."""

    repositories: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    card: Mapping[str, object] = field(default_factory=dict)
    revisions: frozenset[str] = frozenset({"main", COMMIT})
    cut_after: dict[str, int] = field(default_factory=dict)
    """File name to the bytes after which its next download breaks, once."""
    asked: list[str] = field(default_factory=list)
    """Method, path and range of every request."""
    endpoint: str = ""


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` on loopback; `hub.endpoint` is its address."""

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.served.asked.append(f"GET {path} {self.headers.get('Range', '')}".strip())
        if match := INFO.fullmatch(path):
            self._info(match["repo"], match["revision"] or "main")
        elif match := FILE.fullmatch(path):
            self._file(match["repo"], match["revision"], match["file"], body=True)
        else:
            self._refuse(404, "EntryNotFound")

    def do_HEAD(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.served.asked.append(f"HEAD {path}")
        if match := FILE.fullmatch(path):
            self._file(match["repo"], match["revision"], match["file"], body=False)
        else:
            self._refuse(404, "EntryNotFound")

    def log_message(self, *_: object) -> None:
        """Tests keep their output clean."""

    def _info(self, repo: str, revision: str) -> None:
        if repo not in self.served.repositories:
            self._refuse(404, "RepoNotFound")
        elif revision not in self.served.revisions:
            self._refuse(404, "RevisionNotFound")
        else:
            files = self.served.repositories[repo].items()
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files]
            info = {"id": repo, "sha": COMMIT, "siblings": siblings, "cardData": self.served.card}
            self._answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _file(self, repo: str, revision: str, name: str, *, body: bool) -> None:
        data = self.served.repositories.get(repo, {}).get(name)
        if data is None or revision not in self.served.revisions:
            self._refuse(404, "EntryNotFound")
            return
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = int(re.findall(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = self.served.cut_after.pop(name, None) if body else None
        self._answer(206 if start else 200, data[start:], headers, body=body, cut=cut)

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": f"{code} at the stand-in"})

    def _answer(
        self, status: int, data: bytes, headers: Mapping[str, str], *, body: bool = True, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(data[:cut])
        if cut is not None:
            self.close_connection = True
