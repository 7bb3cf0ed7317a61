"""One process of the fleet: start it so that it cannot outlive us, wait until it serves, end it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import msgspec

from llmos import children
from llmos.errors import SetupError
from llmos.fleet import launch
from llmos.fleet.identity import ProcessIdentity, descendants, identify, send_signal, wait_gone
from llmos.fleet.state import Member, MemberStatus, Role
from llmos.lifetime import EXIT_RESTART

log = logging.getLogger(__name__)

_POLL_S = 0.05
_KILL_WAIT_S = 5.0
_TAIL_BYTES = 4096


class RunningMember:
    """Owns one child process from `start` to `stop`."""

    def __init__(
        self,
        name: str,
        role: Role,
        command: Sequence[str],
        log: Path,
        ready_file: Path | None,
        *,
        descriptors: tuple[int, ...] = (),
    ) -> None:
        """`descriptors` are inherited; they stay the caller's."""
        self.name = name
        self.role = role
        self.log_path = log
        self.ports: Mapping[str, int] = {}
        self.id = ""
        self._command = list(command)
        self._descriptors = descriptors
        self._ready_file = ready_file
        self._process: children.Child | None = None
        self._identity = ProcessIdentity(0, "")

    async def start(self) -> None:
        """Start the process in a session of its own, so that a Ctrl-C at the terminal reaches only the supervisor.
        Raises OSError if that can't be done now."""
        launcher = [sys.executable, "-I", "-S", launch.__file__, str(os.getpid())]
        with _fresh_log(self.log_path) as output:
            self._process = children.start(
                [*launcher, *self._command], output=output, keep=self._descriptors, new_session=True
            )
        pid = self._process.pid
        self._identity = identify(pid) or ProcessIdentity(pid, "")

    @property
    def exit_status(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return None if self._process is None else self._process.returncode

    def end_text(self) -> str:
        """How it ended, after its name."""
        status = self.exit_status
        if status is None:
            return "does not serve"
        if status == EXIT_RESTART:
            return f"drained itself to be started afresh ({_last_line(self.log_path)})"
        if status < 0:
            return f"was ended by signal {-status}"
        return f"ended with status {status} ({_last_line(self.log_path)})"

    def describe(self, status: MemberStatus = "running", restarts: int = 0, said: str = "") -> Member:
        """Its line in the state file."""
        return Member(
            name=self.name,
            role=self.role,
            process=self._identity,
            log=str(self.log_path),
            id=self.id,
            ports=dict(self.ports),
            status=status,
            restarts=restarts,
            said=said,
        )

    def check_running(self) -> None:
        """Raises SetupError, with the log's last line, if the process has ended."""
        if self.exit_status is not None:
            raise SetupError(
                f"{self.name} stopped while starting ({_status_text(self.exit_status)}): "
                f"{_last_line(self.log_path)} (log: {self.log_path})"
            )

    def poll_ready(self) -> bool:
        """Whether it has said that it serves; takes its ports from what it said. Raises SetupError if it has ended."""
        self.check_running()
        if self._ready_file is None or self.ports:
            return True
        try:
            document = msgspec.json.decode(self._ready_file.read_bytes(), type=dict[str, str | int | None])
        except (OSError, msgspec.MsgspecError):
            return False
        self.id = str(document.get("id", ""))
        self.ports = {
            key: value for key, value in document.items() if isinstance(value, int) and key.endswith("port") and value
        }
        return True

    async def wait_exit(self) -> int:
        """Wait until it ends; the exit status."""
        assert self._process is not None
        return await self._process.wait()

    async def stop(self, grace_s: float, hurry_s: float | None = None) -> None:
        """SIGTERM; after `hurry_s` once more, which ends a drain; after `grace_s` SIGKILL. Then nothing that it started
        is left either. Idempotent."""
        if self._process is None:
            return
        family = descendants(self._identity)
        send_signal(self._identity, signal.SIGTERM)
        ended = asyncio.ensure_future(self._process.wait())
        if hurry_s is not None and hurry_s < grace_s:
            await asyncio.wait({ended}, timeout=hurry_s)
            send_signal(self._identity, signal.SIGTERM)
            grace_s -= hurry_s
        await asyncio.wait({ended}, timeout=grace_s)
        if not ended.done():
            log.warning("%s did not end within %g s of SIGTERM; killing it", self.name, grace_s)
            family = [*family, *descendants(self._identity), self._identity]
        for process in family:
            send_signal(process, signal.SIGKILL)
        left = await asyncio.to_thread(wait_gone, family, _KILL_WAIT_S)
        if left:
            log.error("%s left processes that do not end: %s", self.name, [process.pid for process in left])
        await asyncio.wait({ended}, timeout=_KILL_WAIT_S)
        ended.cancel()


async def all_ready(members: Sequence[RunningMember]) -> None:
    """Wait until every member serves. The caller bounds the wait. Raises SetupError as soon as one of them ends."""
    waiting = list(members)
    while waiting:
        waiting = [member for member in waiting if not member.poll_ready()]
        await asyncio.sleep(_POLL_S if waiting else 0)


def _fresh_log(path: Path) -> IO[bytes]:
    """A new log; the one before it, if it says anything, is kept as `<name>.log.1`."""
    if path.exists() and path.stat().st_size:
        path.replace(path.with_name(f"{path.name}.1"))
    return path.open("wb")


def _last_line(log: Path) -> str:
    try:
        tail = log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
    except OSError:
        return "its log cannot be read"
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _status_text(status: int) -> str:
    return f"exit status {status}" if status >= 0 else f"signal {-status}"
