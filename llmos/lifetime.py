"""The life of a service process: what signals ask of it, and how its exit status says why it ended.

    0    it was asked to end, and did
    1    it broke: a bug, or a service that it needs answered no more; start it again
    2    it cannot run like this: settings, files or what is installed; starting it again would not help
    75   it drained itself to be started afresh (`EX_TEMPFAIL` of sysexits.h); start it again at once
    130  Ctrl-C before it could do better

Supervisors of every kind rely on these: `llmos up`, systemd, container engines, Kubernetes (docs/operations.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Awaitable, Callable

from llmos.collector import spare_the_collector
from llmos.errors import ClientError, EtcdAuthFailed, LlmosError, SetupError

log = logging.getLogger(__name__)

EXIT_ENDED = 0
EXIT_BROKE = 1
EXIT_SETUP = 2
EXIT_RESTART = 75
EXIT_INTERRUPTED = 130


class Stop(asyncio.Event):
    """Set when the process is to drain and end: by the first SIGTERM or SIGINT, or from inside."""

    def __init__(self) -> None:
        super().__init__()
        self.hurry = asyncio.Event()
        """Set by a second signal: end now, whatever is not done."""
        self.status = EXIT_ENDED
        """The exit status of an orderly end."""

    def signalled(self) -> None:
        """One more signal has come."""
        (self.hurry if self.is_set() else self).set()


def run_until_signal(serve: Callable[[Stop], Awaitable[None]]) -> int:
    """Run `serve(stop)`; SIGTERM and SIGINT set `stop`, a second one `stop.hurry`. Returns the exit status."""
    stop = Stop()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            # Not on Windows, where Ctrl-C arrives as KeyboardInterrupt instead.
            with contextlib.suppress(NotImplementedError):
                loop.add_signal_handler(number, stop.signalled)
        await serve(stop)

    spare_the_collector()
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # children are executed, never just forked
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(main())
    except LlmosError as error:
        log.error("%s", error.message)
        return EXIT_SETUP if isinstance(error, SetupError | ClientError | EtcdAuthFailed) else EXIT_BROKE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return stop.status


async def first_of(*events: asyncio.Event, timeout_s: float | None = None) -> bool:
    """Wait until one of the events is set, at most `timeout_s`; whether one is."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        done, _ = await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return bool(done)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, the faster one; asyncio's own where it is not installed (Windows, for one)."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop  # type: ignore[no-any-return, unused-ignore]
