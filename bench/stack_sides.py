"""The processes that `bench.stack` measures, and those that measure them."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil

from bench.peers.places import ROOT
from bench.servers import end, free_port
from bench.sides.side import SideError
from llmos.v1 import fleet_pb2, fleet_pb2_grpc

START_S = 60.0
STOP_S = 30.0
_ANSWER_S = 90.0


@dataclass(frozen=True, slots=True)
class Fleet:
    """A running fleet with an echo worker."""

    http_port: int
    grpc_port: int
    pid: int
    """Of `llmos up`."""

    def cpu_s(self) -> Mapping[str, float]:
        """Processor time so far, by kind of process."""
        found: Counter[str] = Counter()
        for process in psutil.Process(self.pid).children(recursive=True):
            with suppress(psutil.Error):  # gone meanwhile
                times = process.cpu_times()
                found[_kind(process.cmdline())] += times.user + times.system
        return found


def _kind(command: Sequence[str]) -> str:
    kinds = {"scheduler": "scheduler", "gateway": "gateway", "worker": "worker", "worker.engine_process": "engine"}
    named = (kinds[module] for flag, module in itertools.pairwise(command) if flag == "-m" and module in kinds)
    return next(named, "etcd")


@contextmanager
def fleet(*options: str) -> Iterator[Fleet]:
    """`llmos up` with an echo worker. Raises SideError."""
    ports = free_port(), free_port()
    with tempfile.TemporaryDirectory() as scratch:
        where = ["--http-port", str(ports[0]), "--grpc-port", str(ports[1]), "--data-dir", f"{scratch}/fleet"]
        command = [sys.executable, "-m", "llmos.cli.main", "up", "--backend", "echo", *where, *options]
        with running("llmos up", command, Path(scratch) / "log", ports[0], "/ready") as process:
            yield Fleet(*ports, process.pid)


@contextmanager
def bare_server(event: str) -> Iterator[int]:
    """The bare server of events; yields its port."""
    port = free_port()
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "bench.sides.bare_sse", str(port)]
        with running("the bare server", command, Path(scratch) / "log", port, "", BENCH_EVENT=event):
            yield port


def load(**options: Any) -> Mapping[str, Any]:
    """Run a load (`bench.sides.sse_load.Load`) in a process of its own; returns what it found."""
    found: Mapping[str, Any] = json.loads(_run(["bench.sides.sse_load"], json.dumps(options)))
    return found


def grpc_hop(rate: float, size: int, seconds: float) -> Sequence[float]:
    """Ages, in milliseconds, of messages of `size` bytes after one bare `grpc.aio` hop, `rate` a second."""
    command = [sys.executable, "-m", "bench.sides.grpc_hop", "serve", str(rate), str(size)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=_environ())
    try:
        assert server.stdout
        ages: Sequence[float] = json.loads(
            _run(["bench.sides.grpc_hop", "read", server.stdout.readline().strip(), str(seconds)])
        )
        return ages
    finally:
        server.kill()
        server.wait()
        if server.stdout:
            server.stdout.close()


def emitted_ns(grpc_port: int, request_ids: Sequence[str]) -> Mapping[str, tuple[int, int]]:
    """When the engine made the first and the last token of each request, from their traces; others are left out."""
    with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        stub: Any = fleet_pb2_grpc.FleetStub(channel)
        found = {}
        for name in request_ids:
            spans = stub.GetTrace(fleet_pb2.GetTraceRequest(id=name), timeout=5).spans
            ends = {span.name: span.end_unix_ns for span in spans}
            if {"engine.prefill", "engine.decode"} <= ends.keys():
                found[name] = (ends["engine.prefill"], ends["engine.decode"])
        return found


@contextmanager
def running(
    name: str, command: Sequence[str], log: Path, port: int, path: str, **environ: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A server that answers; ended afterwards with all its processes."""
    with log.open("w+") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=_environ(**environ), start_new_session=True
        )
        try:
            deadline = time.monotonic() + START_S
            while not _answers(port, path):
                if process.poll() is not None or time.monotonic() > deadline:
                    words = " / ".join(log.read_text(errors="replace").splitlines()[-5:])
                    raise SideError(f"{name} did not start: {words[-1000:]}")
                time.sleep(0.1)
            yield process
        finally:
            end(process)


def _answers(port: int, path: str) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 2) as sock:
            if not path:
                return True
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n".encode())
            return sock.recv(64).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def _run(arguments: Sequence[str], given: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        input=given,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=_environ(),
        timeout=_ANSWER_S,
        check=False,
    )
    if done.returncode:
        raise SideError(f"{arguments[0]} failed: {done.stderr[-500:]}")
    return done.stdout


def _environ(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}
