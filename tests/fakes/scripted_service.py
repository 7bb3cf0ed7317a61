"""Stands in for a scheduler, worker or gateway under the supervisor: says that it is ready, then behaves as told.

Run as a program: `python scripted_service.py BEHAVIOUR READY_FILE [PORT | fd:DESCRIPTOR]`. Behaviours: `serve`; `fail`
ends with a complaint; `silent` never becomes ready; `deaf` ignores SIGTERM and has a child of its own; `mortal` ends at
once if there is a file READY_FILE.doom, with the status that it holds.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


class Ready(BaseHTTPRequestHandler):
    """Answers 200 to everything, without a word in the log."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the signature that http.server calls
        del format, args


def listen(where: str) -> HTTPServer:
    """On a port, or on an inherited socket."""
    if not where.startswith("fd:"):
        return HTTPServer(("127.0.0.1", int(where)), Ready)
    server = HTTPServer(("127.0.0.1", 0), Ready, bind_and_activate=False)
    server.socket.close()
    server.socket = socket.socket(fileno=int(where.removeprefix("fd:")))
    server.server_port = server.socket.getsockname()[1]
    return server


def main(behaviour: str, ready_file: Path, where: str = "0") -> int:
    doom = ready_file.with_suffix(".doom")
    if behaviour == "mortal" and doom.exists():
        sys.stderr.write("doomed\n")
        return int(doom.read_text())
    if behaviour == "fail":
        sys.stderr.write("first line\nno such model\n")
        return 3
    if behaviour == "silent":
        threading.Event().wait()
    if behaviour == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    server = listen(where)
    port = server.server_port
    document = {"id": ready_file.stem, "pid": os.getpid(), "port": port, "http_port": port, "grpc_port": port}
    unfinished = ready_file.with_suffix(".part")
    unfinished.write_text(json.dumps(document))
    unfinished.replace(ready_file)
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]))
