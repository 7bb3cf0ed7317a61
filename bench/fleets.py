"""A fleet of echo workers for a benchmark: etcd, one scheduler, workers and gateways as processes, ended afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench.peers.places import ROOT
from bench.sides.side import SideError
from llmos.fleet.etcd_server import etcd_command, find_etcd, free_ports
from worker.probe import MODEL_SHARE

_START_S = 60.0
BLOCK_BYTES = 64 * 1024
"""KV bytes of a block of 64 tokens of an echo model."""


@dataclass(slots=True)
class Fleet:
    """What runs. Processes by name: `scheduler`, `gateway-0`, ..."""

    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    ready: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def ports(self) -> list[int]:
        """HTTP ports of the gateways."""
        return [said["http_port"] for name, said in self.ready.items() if name.startswith("gateway")]

    def rss(self, prefix: str) -> int:
        """Bytes of main memory that processes of a kind have, the largest one."""
        found = [process.pid for name, process in self.processes.items() if name.startswith(prefix)]
        return max(psutil.Process(pid).memory_info().rss for pid in found)

    def start(self, name: str, command: Sequence[str]) -> None:
        """Start a process with a log of its own."""
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(ROOT)}
            )

    def service(self, module: str, name: str, *options: str) -> None:
        """Start `python -m module` and wait for its ready file. Raises SideError."""
        ready = self.folder / f"{name}.json"
        self.start(name, [sys.executable, "-m", module, "--ready-file", str(ready), *options])
        deadline = time.monotonic() + _START_S
        while not ready.exists():
            if self.processes[name].poll() is not None or time.monotonic() > deadline:
                words = (self.folder / f"{name}.log").read_text(errors="replace").splitlines()[-5:]
                raise SideError(f"{name} did not start: {' / '.join(words)[-1000:]}")
            time.sleep(0.05)
        self.ready[name] = json.loads(ready.read_text())

    def close(self) -> None:
        """End everything."""
        for process in reversed(self.processes.values()):
            process.kill()
            process.wait()


def _await_ready(port: int) -> None:
    """Until a gateway serves a model. Raises SideError."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
            return
        time.sleep(0.05)
    raise SideError(f"the gateway on port {port} did not get ready")


@contextmanager
def fleet(
    *,
    gateways: int = 1,
    workers: int = 1,
    blocks: int = 32,
    tokens_per_second: float = 0.0,
    scheduler: Sequence[str] = (),
    gateway: Sequence[str] = (),
) -> Iterator[Fleet]:
    """A fleet that serves `echo`: workers with so many KV blocks (32 at least), each stream at so many tokens a second
    (0: any)."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Fleet(Path(scratch))
        client, peer = free_ports(2)
        try:
            made.start("etcd", etcd_command(find_etcd(), made.folder / "etcd", client, peer))
            etcd = ("--etcd-endpoints", f"127.0.0.1:{client}")
            made.service("scheduler", "scheduler", "--port", "0", *etcd, *scheduler)
            # Half a block more, so that rounding costs none.
            memory = str(int((blocks + 0.5) * BLOCK_BYTES / MODEL_SHARE))
            speed = ("--echo-tokens-per-second", str(tokens_per_second))
            for number in range(workers):
                shape = ("--backend", "echo", "--model", "echo", "--memory-limit", memory, *speed)
                made.service("worker", f"worker-{number}", "--port", "0", *etcd, *shape)
            where = ("--schedulers", f"127.0.0.1:{made.ready['scheduler']['port']}", "--http-port", "0")
            for number in range(gateways):
                made.service("gateway", f"gateway-{number}", *where, "--grpc-port", "0", *gateway)
            for port in made.ports:
                _await_ready(port)
            yield made
        finally:
            made.close()
