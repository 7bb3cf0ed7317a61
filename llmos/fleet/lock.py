"""One fleet per data folder: a lock that the kernel releases when its holder dies, whatever killed it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from llmos.errors import Conflict

LOCK_FILE = "fleet.lock"


class FleetLock:
    """Held by the supervisor for its whole life. Children do not inherit it."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._handle: int | None = None

    def __enter__(self) -> FleetLock:
        """Take the lock. Raises Conflict if another supervisor of this folder lives."""
        handle = os.open(self._data_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise Conflict(already_runs(self._data_dir)) from error
        self._handle = handle
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def already_runs(data_dir: Path) -> str:
    """What to tell somebody who wants a second fleet in the same folder."""
    return (
        f"a fleet already runs in {data_dir}: stop it with `llmos down --data-dir {data_dir}`, "
        "or start this one with another --data-dir"
    )
