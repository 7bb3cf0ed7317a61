"""The processes of a fleet under test: started side by side, killed, frozen, thawed, replaced on the same port."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from tests.faults.ledger import Ledger

ROOT = Path(__file__).parents[2]
_START_S = 90.0
_POLL_S = 0.02
_STAMP = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) ")


class Service:
    """One place in the fleet: a role, flags, a port; whatever process fills it at the moment."""

    def __init__(
        self,
        role: str,
        number: int,
        module: str,
        flags: Callable[[], list[str]],
        ledger: Ledger,
        *,
        wrap: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        self.role = role
        self.number = number
        self.name = f"{role}-{number}"
        self.folder = ledger.folder / self.name
        self.orders = self.folder / "orders"
        """Where orders to a worker's engine go (see `doubles/engine.py`)."""
        self.log = self.folder / "log"
        self.address = ""
        """Where its peers reach it."""
        self.ready: dict[str, Any] = {}
        self.marked = False
        """Something was done to it that only a new process makes good."""
        self._module = module
        self._flags = flags
        self._ledger = ledger
        self._wrap = wrap
        self._environment = environment or {}
        self._process: subprocess.Popen[bytes] | None = None
        self.orders.mkdir(parents=True, exist_ok=True)

    @property
    def id(self) -> str:
        """Its node id, once ready."""
        return str(self.ready.get("id", ""))

    @property
    def pid(self) -> int:
        """Process id of the service itself."""
        return int(self.ready["pid"])

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self._process is not None and self._process.poll() is None

    def spawn(self) -> None:
        """Start a process, without waiting for it."""
        ready = self.folder / "ready.json"
        ready.unlink(missing_ok=True)
        for order in self.orders.iterdir():
            order.unlink()
        command = [*self._wrap, sys.executable, "-m", self._module, "--ready-file", str(ready), *self._flags()]
        environment = {
            **os.environ,
            "PYTHONWARNINGS": "default",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_WAIT_POLICY": "PASSIVE",
            "LLMOS_TEST_ORDERS": str(self.orders),
            **self._environment,
        }
        with self.log.open("ab") as out:
            # In a session of its own: a process group that loses its shell has its stopped processes continued.
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=out, env=environment, start_new_session=True
            )
        self._ledger.note("process", self._process.pid)
        self.marked = False

    def wait_ready(self, timeout_s: float = _START_S) -> None:
        """Until it serves. Raises RuntimeError with the end of its log."""
        ready, deadline = self.folder / "ready.json", time.monotonic() + timeout_s
        while not ready.exists():
            if not self.alive or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} did not come up:\n{self.log.read_text()[-2000:]}")
            time.sleep(_POLL_S)
        self.ready = json.loads(ready.read_text())

    def family(self) -> list[psutil.Process]:
        """The service and its children: of a worker, the engine."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.pid)
            return [parent, *parent.children(recursive=True)]
        return []

    def signal(self, number: signal.Signals, *, children: bool = True, itself: bool = True) -> None:
        """To the service, its children, or both."""
        for one in self.family():
            if (one.pid == self.pid and itself) or (one.pid != self.pid and children):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to the service alone, as the kernel or an operator does it, and reap."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid if self.ready else self._process.pid, signal.SIGKILL)
            self._process.wait(10)

    def stop(self, timeout_s: float = 40.0) -> int:
        """SIGTERM, and wait; the exit status."""
        assert self._process is not None
        os.kill(self.pid, signal.SIGTERM)
        return self._process.wait(timeout_s)

    def wait_end(self, timeout_s: float) -> int:
        """Wait until it ends by itself; the exit status. Raises RuntimeError if it does not."""
        assert self._process is not None
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{self.name} did not end within {timeout_s:.0f} s") from error

    def end(self) -> None:
        """Whatever state it is in: gone."""
        if self.ready:
            self.signal(signal.SIGCONT)
        self.kill()

    def order(self, name: str) -> None:
        """Give an order to the engine."""
        (self.orders / name).touch()

    def recall(self, name: str) -> None:
        """Take it back."""
        (self.orders / name).unlink(missing_ok=True)

    def first_line(self, pattern: str, since: float) -> tuple[float, str] | None:
        """The first line of its log at or after `since` (seconds since 1970) that matches; with its time."""
        wanted = re.compile(pattern)
        for line in self.log.read_text(errors="replace").splitlines():
            stamp = _STAMP.match(line)
            if stamp is None or wanted.search(line) is None:
                continue
            at = datetime.strptime(stamp[1], "%Y-%m-%d %H:%M:%S").timestamp() + int(stamp[2]) / 1000
            if at >= since - 0.001:
                return at, line
        return None
