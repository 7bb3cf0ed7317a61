"""A lock between processes that dies with its holder: `flock` on a file that is never deleted."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from llmos.clock import Clock, SystemClock
from llmos.errors import StoreBusy

POLL_S = 0.05


@contextlib.contextmanager
def held(
    path: Path, wait_s: float, *, clock: Clock | None = None, sleep: Callable[[float], None] = time.sleep
) -> Iterator[None]:
    """Hold the lock file `path`, waiting at most `wait_s` seconds. Raises `StoreBusy` with the holder's process id.

    Two holders in one process exclude each other as well.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not acquire(descriptor, wait_s, clock=clock, sleep=sleep):
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise StoreBusy(f"Process {holder} has held {path.name} of the model store for over {wait_s:.0f} s.")
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def acquire(
    descriptor: int, wait_s: float, *, clock: Clock | None = None, sleep: Callable[[float], None] = time.sleep
) -> bool:
    """Lock an open file or folder until it is closed. False if somebody else still holds it after `wait_s` seconds."""
    now = (clock or SystemClock()).monotonic
    deadline = now() + wait_s
    while True:
        with contextlib.suppress(BlockingIOError):  # somebody else holds it; look again until the deadline
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if now() >= deadline:
            return False
        sleep(POLL_S)
