"""Which process a pid means. A pid alone is not enough to kill by: the system gives it to somebody else later."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec
import psutil

_POLL_S = 0.02


class ProcessIdentity(msgspec.Struct, frozen=True):
    """A process, now and for ever: its pid and a mark of its birth that no later process with that pid has."""

    pid: int
    birth: str


def identify(pid: int) -> ProcessIdentity | None:
    """The process that has this pid now; None if there is none, or only an unreaped one."""
    birth = _birth(pid)
    return None if birth is None else ProcessIdentity(pid, birth)


def is_alive(process: ProcessIdentity) -> bool:
    """Whether this very process still runs. An unreaped one does not."""
    return _birth(process.pid) == process.birth


def send_signal(process: ProcessIdentity, number: signal.Signals) -> bool:
    """Signal this very process; False if it has ended."""
    if not is_alive(process):
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, number)
        return True
    return False


def wait_gone(processes: Iterable[ProcessIdentity], timeout_s: float) -> list[ProcessIdentity]:
    """Wait until all have ended, at most `timeout_s`. Returns those that still run."""
    deadline = time.monotonic() + timeout_s
    left = [process for process in processes if is_alive(process)]
    while left and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        left = [process for process in left if is_alive(process)]
    return left


def descendants(process: ProcessIdentity) -> list[ProcessIdentity]:
    """Children, their children and so on, as of now."""
    if not is_alive(process):
        return []
    with contextlib.suppress(psutil.Error):
        found = (identify(child.pid) for child in psutil.Process(process.pid).children(recursive=True))
        return [child for child in found if child is not None]
    return []


def _birth(pid: int) -> str | None:
    """Boot id and start tick on Linux, which a changed wall clock leaves alone; else psutil's start time."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        # The name in parentheses may hold anything, so fields are counted from the last parenthesis.
        fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return _birth_elsewhere(pid)
    return None if fields[0] in "ZX" else f"{boot}/{fields[19]}"


def _birth_elsewhere(pid: int) -> str | None:
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
    except psutil.Error:
        return None
