"""Child processes, started without running Python between fork and exec.

uvloop, as `asyncio.create_subprocess_exec` uses it, forks and runs the interpreter's after-fork code in the child. In a
process with threads (gRPC's, torch's) that code may wait for ever for a lock that a thread held, and the parent's loop
waits with it. `subprocess` uses `vfork`, where nothing of ours runs in the child.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Sequence
from typing import IO

_POLL_S = 0.2


class Child:
    """A started process. Whoever holds it must see to its end."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """Its number, which stays its own until its end was noticed."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit status; negative: the signal that ended it; None: it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """End it at once. Nothing happens if it has ended."""
        self._process.send_signal(signal.SIGKILL)

    async def wait(self) -> int:
        """Wait for its end. May be waited for by several, and be cancelled."""
        while (status := self._process.poll()) is None:
            try:
                await _ended(self._process)
            except OSError:  # no descriptor is left to wait on
                await asyncio.sleep(_POLL_S)
        return status


def start(
    command: Sequence[str],
    *,
    output: IO[bytes] | None = None,
    keep: Sequence[int] = (),
    new_session: bool = False,
) -> Child:
    """Start a program with empty input. Raises OSError if it can't be run.

    `output` takes what it writes to either stream (default: it shares ours); `keep` are the open descriptors that it
    inherits under their numbers.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=keep,
        start_new_session=new_session,
    )
    return Child(process)


async def _ended(process: subprocess.Popen[bytes]) -> None:
    if not hasattr(os, "pidfd_open"):  # Linux only
        await asyncio.to_thread(process.wait)
        return
    descriptor = os.pidfd_open(process.pid)
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    try:
        loop.add_reader(descriptor, readable.set)
        await readable.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
