"""The engine process alone, at the end of a socket, and the link that keeps one running."""

from __future__ import annotations

import asyncio
import functools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

import msgspec
import pytest

from llmos.clock import SystemClock
from llmos.errors import SetupError, Unavailable
from llmos.internal.v1 import work_pb2
from tests.integration.worker.processes import gone
from worker import pipe
from worker.engine_link import EngineLink
from worker.engine_process import EngineSetup

SETUP = EngineSetup(backend="echo", threads=1, tokens_per_second=0.0, models=())


def test_an_engine_whose_parent_is_gone_ends_at_once() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        # Not the parent's id: as if the parent had died before the engine could ask to die with it.
        command = [sys.executable, "-m", "worker.engine_process", str(theirs.fileno()), "1"]
        done = subprocess.run(command, pass_fds=[theirs.fileno()], timeout=30, check=False)
    assert done.returncode == 0


def test_the_end_of_the_socket_ends_an_engine_that_hangs() -> None:
    """The portable way, without the kernel's help: a process that never steps again still ends."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", "worker.engine_process", str(theirs.fileno()), str(os.getpid())]
        child = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    pipe.write(ours, msgspec.json.encode(SETUP))
    with ours.makefile("rb") as stream:
        assert pipe.read(stream) is not None
    child.send_signal(signal.SIGTERM)
    child.send_signal(signal.SIGINT)
    closer = threading.Thread(target=ours.close)
    closer.start()
    closer.join(10)
    assert child.wait(timeout=30) == 0


class Listener:
    """Remembers what the link tells."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.news = asyncio.Event()

    def engine_ready(self, report: work_pb2.WorkerReport) -> None:
        self.told.append(report.numerics_fingerprint)
        self.news.set()

    def engine_frame(self, frame: work_pb2.WorkFrame) -> None:
        self.told.append("frame")

    def engine_lost(self, reason: str) -> None:
        self.told.append(reason)
        self.news.set()

    async def hear(self) -> None:
        async with asyncio.timeout(30):
            await self.news.wait()
        self.news.clear()


async def test_the_link_starts_the_engine_again_and_ends_it_at_the_end() -> None:
    listener = Listener()
    link = EngineLink(SETUP, listener, clock=SystemClock(), rng=random.Random(7))
    with pytest.raises(Unavailable):
        link.send([])
    running = asyncio.create_task(link.run())
    await listener.hear()
    first = link.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await listener.hear()
    with pytest.raises(Unavailable):
        link.send([])
    await listener.hear()
    second = link.pid
    assert second is not None
    assert listener.told == ["echo-1", "signal 9", "echo-1"]
    assert link.restarts == 1
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await link.close()
    assert gone(first)
    assert gone(second)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - another process decides
            await asyncio.sleep(0.01)


def serves(link: EngineLink, pid: int | None) -> bool:
    return link.ready.is_set() and link.pid == pid


async def test_a_spare_takes_the_place_of_a_lost_engine() -> None:
    listener = Listener()
    link = EngineLink(SETUP, listener, clock=SystemClock(), rng=random.Random(7), spare_after_s=0.0)
    running = asyncio.create_task(link.run())
    seen: list[int | None] = []
    for _ in range(2):
        await until(lambda: link.ready.is_set() and link.spare_pid is not None)
        seen += [link.pid, spare := link.spare_pid]
        assert link.pid is not None
        os.kill(link.pid, signal.SIGKILL)
        await until(functools.partial(serves, link, spare))
    assert listener.told == ["echo-1", "signal 9"] * 2 + ["echo-1"]
    await until(lambda: link.spare_pid is not None)
    seen.append(link.spare_pid)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await link.close()
    assert all(pid is not None and gone(pid) for pid in seen)


async def test_an_engine_is_replaced_without_a_spare_if_that_is_gone_too() -> None:
    listener = Listener()
    link = EngineLink(SETUP, listener, clock=SystemClock(), rng=random.Random(7), spare_after_s=0.0)
    running = asyncio.create_task(link.run())
    await until(lambda: link.spare_pid is not None)
    assert link.spare_pid is not None and link.pid is not None
    os.kill(link.spare_pid, signal.SIGKILL)
    await until(lambda: link.spare_pid is None)
    first = link.pid
    os.kill(first, signal.SIGKILL)
    await until(lambda: link.restarts == 1 and link.ready.is_set())
    assert link.pid != first
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await link.close()


async def test_an_engine_that_never_starts_is_given_up() -> None:
    broken = EngineSetup(backend="echo", threads=1, tokens_per_second=0.0, models=(), log_level="shout")
    link = EngineLink(broken, Listener(), clock=SystemClock(), rng=random.Random(7))
    with pytest.raises(SetupError):
        await asyncio.wait_for(link.run(), 60)
    assert link.restarts > 1


async def test_an_engine_that_stands_still_is_killed_at_the_end() -> None:
    listener = Listener()
    link = EngineLink(SETUP, listener, clock=SystemClock(), rng=random.Random(7))
    running = asyncio.create_task(link.run())
    await listener.hear()
    pid = link.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await link.close()
    assert gone(pid)
