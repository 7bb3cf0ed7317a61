"""A real fleet for tests: etcd, schedulers, workers and gateways as processes on port 0, each with its own log.

Not a fake of anything: it starts `python -m scheduler|worker|gateway` and waits for their ready files.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tests.fakes.etcd_server import EtcdServer

ROOT = Path(__file__).parents[2]
T = TypeVar("T")


def wait_for(condition: Callable[[], T], what: str, timeout_s: float = 30.0) -> T:
    """The first true value of `condition`; fails the test once `timeout_s` has passed."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s:.0f} s in vain for {what}")
        time.sleep(0.02)


@dataclass(slots=True)
class Process:
    """One service process."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path
    _ready_file: Path
    _ready_within_s: float
    _said: dict[str, Any] = field(default_factory=dict)

    @property
    def ready(self) -> dict[str, Any]:
        """What its ready file says; waits for it. Fails the test if the process ends before, or takes too long."""
        if not self._said:
            wait_for(self._started, f"{self.name} to be ready (log: {self.log})", self._ready_within_s)
            self._said = json.loads(self._ready_file.read_text())
        return self._said

    def _started(self) -> bool:
        if self.popen.poll() is not None:
            raise AssertionError(f"{self.name} exited with {self.popen.returncode}:\n{self.log.read_text()[-4000:]}")
        return self._ready_file.exists()

    @property
    def id(self) -> str:
        return str(self.ready["id"])

    @property
    def pid(self) -> int:
        return self.popen.pid

    def kill(self) -> None:
        """SIGKILL, and reap."""
        self.signal(signal.SIGKILL)
        self.popen.wait(10)

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def stop(self, timeout_s: float = 30) -> int:
        """SIGTERM and wait; the exit status."""
        self.signal(signal.SIGTERM)
        return self.popen.wait(timeout_s)


class Fleet:
    """Owns every process it starts; `close` leaves none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.etcd = EtcdServer(folder / "etcd")
        self.processes: list[Process] = []
        self._wait = True
        self.environment = {**os.environ, "PYTHONWARNINGS": "default", "TOKENIZERS_PARALLELISM": "false"}

    def start(self, module: str, *flags: str, name: str = "", timeout_s: float = 60) -> Process:
        """Start `python -m module`; outside `together`, wait until it has written its ready file."""
        name = name or f"{module}-{len(self.processes)}"
        ready, log = self.folder / f"{name}.ready.json", self.folder / f"{name}.log"
        command = [sys.executable, "-m", module, "--ready-file", str(ready), *flags]
        with log.open("wb") as stream:
            popen = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream, env=self.environment)

        process = Process(name, popen, log, ready, timeout_s)
        self.processes.append(process)
        if self._wait:
            _ = process.ready
        return process

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is started within begins side by side; at the end all of it is ready."""
        before, self._wait = len(self.processes), False
        try:
            yield
        finally:
            self._wait = True
        for process in self.processes[before:]:
            _ = process.ready

    def scheduler(self, *flags: str) -> Process:
        return self.start("scheduler", "--port", "0", "--etcd-endpoints", self.etcd.address, *flags)

    def worker(self, *flags: str, model: str = "echo") -> Process:
        return self.start("worker", "--etcd-endpoints", self.etcd.address, "--model", model, *flags)

    def gateway(self, *flags: str) -> Process:
        schedulers = ",".join(f"127.0.0.1:{p.ready['port']}" for p in self.processes if p.name.startswith("scheduler"))
        return self.start("gateway", "--schedulers", schedulers, "--http-port", "0", "--grpc-port", "0", *flags)

    def gateways(self) -> list[Process]:
        return [process for process in self.processes if process.name.startswith("gateway")]

    @property
    def http(self) -> str:
        """Base URL of the first gateway."""
        return f"http://127.0.0.1:{self.gateways()[0].ready['http_port']}"

    @property
    def grpc(self) -> str:
        """host:port of the first gateway's public gRPC."""
        return f"127.0.0.1:{self.gateways()[0].ready['grpc_port']}"

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a GET at the first gateway; (0, b"") if nobody answers."""
        try:
            with urllib.request.urlopen(self.http + path, timeout=5) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return 0, b""

    def wait_ready(self, models: int = 1, timeout_s: float = 60) -> None:
        """Wait until the first gateway is ready and serves at least `models` models."""

        def served() -> bool:
            status, body = self.get("/v1/models")
            return status == 200 and len(json.loads(body)["data"]) >= models and self.get("/ready")[0] == 200

        wait_for(served, f"the fleet to serve {models} model(s) (logs: {self.folder})", timeout_s)

    def cli(self, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Run the `llmos` command against this fleet."""
        environment = {**self.environment, "LLMOS_ADDRESS": self.grpc}
        command = [sys.executable, "-m", "llmos.cli.main", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s)

    def nodes(self) -> list[dict[str, Any]]:
        """What `llmos nodes --json` prints."""
        done = self.cli("nodes", "--json")
        assert done.returncode == 0, done.stderr
        return list(json.loads(done.stdout))

    def workers(self) -> dict[str, dict[str, Any]]:
        """Worker nodes by id."""
        return {node["id"]: node for node in self.nodes() if node["role"] == "worker"}

    def close(self) -> None:
        for process in reversed(self.processes):
            with suppress(ProcessLookupError):
                process.popen.send_signal(signal.SIGCONT)
                process.popen.kill()
            process.popen.wait(10)
        self.etcd.stop()


@contextmanager
def running_fleet(folder: Path) -> Iterator[Fleet]:
    """A fleet with etcd started and no service yet."""
    folder.mkdir(parents=True, exist_ok=True)
    fleet = Fleet(folder)
    try:
        fleet.etcd.start()
        yield fleet
    finally:
        fleet.close()


@contextmanager
def echo_fleet(
    folder: Path, workers: int = 1, scheduler: tuple[str, ...] = (), worker: tuple[str, ...] = ()
) -> Iterator[Fleet]:
    """A fleet that serves the model `echo`, ready for requests."""
    with running_fleet(folder) as fleet:
        with fleet.together():
            fleet.scheduler(*scheduler)
            for _ in range(workers):
                fleet.worker("--backend", "echo", *worker)
            fleet.gateway()
        fleet.wait_ready()
        yield fleet
