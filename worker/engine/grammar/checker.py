"""The process in which a constraint is tried first: `python -m worker.engine.grammar.checker FD`.

It reads vocabularies once and forks for every check. The fork has a bound on time and memory and may die of either;
the engine's process never compiles what did not pass here. Forks are nice, so that steps come first.

Messages are JSON over `worker.pipe`'s framing: `Order` comes in, `Verdict` goes out. It ends when its socket ends.
"""

from __future__ import annotations

import ctypes
import os
import resource
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from llmos.errors import LlmosError
from worker import pipe
from worker.backend import Constraint
from worker.engine.grammar.vocabulary import Vocabulary

CPU_S = 0.15
"""Processor time of a check; what people write takes a few milliseconds."""
WALL_S = 0.8
"""A check that took longer is given up, however little of the processor it got."""
_STARVED_S = CPU_S / 2
"""A check that was given up before it got this much of the processor says something about the machine only: a refusal
is final and kept, so it must not come from a busy one."""
MEMORY_BYTES = 128 << 20
"""Address space that a check may take besides what the process has."""
_STACK_BYTES = 2 << 20
"""Less than the engine's threads have: a recursion that passes here does not overflow there."""
_NICENESS = 5
_PR_SET_PDEATHSIG = 1
_LENGTH = struct.Struct("<I")


class Order(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Either a vocabulary to read (`folder` is set) or a constraint to check against one that was read."""

    number: int
    vocabulary: int
    """Chosen by the asker."""
    folder: str = ""
    size: int = 0
    end_tokens: Sequence[int] = ()
    kind: Literal["json_schema", "json_object", "regex", "choice"] = "json_object"
    text: str = ""
    texts: Sequence[str] = ()


class Verdict(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Answers an order."""

    number: int
    code: str = ""
    """Empty: passed; else of `llmos.errors`."""
    message: str = ""


@dataclass(slots=True)
class _Check:
    number: int
    pid: int
    deadline: float
    answer: bytes = b""


class Checker:
    """Owns the socket and the forks."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._vocabularies: dict[int, Vocabulary] = {}
        self._checks: dict[int, _Check] = {}
        """By the pipe that its answer comes from."""
        self._selector = selectors.DefaultSelector()
        self._selector.register(sock, selectors.EVENT_READ)

    def run(self) -> None:
        """Serve until the asker is gone."""
        while True:
            for key, _ in self._selector.select(self._wait_s()):
                if key.fileobj is not self._sock:
                    self._collect(key.fd)
                elif not self._receive():
                    return
            self._kill_overdue()

    def _wait_s(self) -> float | None:
        first = min((check.deadline for check in self._checks.values()), default=None)
        return None if first is None else max(0.0, first - time.monotonic())

    def _receive(self) -> bool:
        head = self._sock.recv(_LENGTH.size, socket.MSG_WAITALL)
        if len(head) < _LENGTH.size:
            return False
        body = self._sock.recv(_LENGTH.unpack(head)[0], socket.MSG_WAITALL)
        order = msgspec.json.decode(body, type=Order)
        if order.folder:
            self._read(order)
        else:
            self._fork(order)
        return True

    def _read(self, order: Order) -> None:
        try:
            vocabulary = Vocabulary(Path(order.folder), order.size, order.end_tokens)
        except LlmosError as error:
            self._answer(Verdict(number=order.number, code=error.code, message=error.message))
        else:
            self._vocabularies[order.vocabulary] = vocabulary
            self._answer(Verdict(number=order.number))

    def _fork(self, order: Order) -> None:
        here, there = os.pipe()
        pid = os.fork()
        if pid == 0:
            _check(self._vocabularies, order, there)
        os.close(there)
        self._checks[here] = _Check(order.number, pid, time.monotonic() + WALL_S)
        self._selector.register(here, selectors.EVENT_READ)

    def _collect(self, source: int) -> None:
        data = os.read(source, 1 << 16)
        if data:
            self._checks[source].answer += data
            return
        self._selector.unregister(source)
        os.close(source)
        check = self._checks.pop(source)
        _, status, used = os.wait4(check.pid, 0)
        if check.answer:
            self._answer(msgspec.json.decode(check.answer, type=Verdict))
        else:
            self._answer(died(check.number, status, used.ru_utime + used.ru_stime))

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        for check in self._checks.values():
            if check.deadline <= now:
                os.kill(check.pid, signal.SIGKILL)

    def _answer(self, verdict: Verdict) -> None:
        pipe.write(self._sock, msgspec.json.encode(verdict))


def died(number: int, status: int, used_s: float) -> Verdict:
    """What the end of a check without an answer says: its wait status, and how much of the processor it had."""
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and used_s < _STARVED_S:
        return Verdict(number=number, code="unavailable", message="The constraint could not be checked in time.")
    message = "The constraint is too complex: compiling it takes too much time or memory."
    return Verdict(number=number, code="invalid_constraint", message=message)


def _check(vocabularies: Mapping[int, Vocabulary], order: Order, answer: int) -> None:
    """The fork's whole life."""
    status = 1
    try:
        _confine()
        try:
            constraint = Constraint(order.kind, order.text, tuple(order.texts))
            vocabularies[order.vocabulary].compile(constraint)
            verdict = Verdict(number=order.number)
        except LlmosError as error:
            verdict = Verdict(number=order.number, code=error.code, message=error.message)
        os.write(answer, msgspec.json.encode(verdict))
        status = 0
    finally:
        os._exit(status)


def _confine() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        present = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most = present + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    os.nice(_NICENESS)
    resource.setrlimit(resource.RLIMIT_STACK, (_STACK_BYTES, _STACK_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A failed allocation would announce itself there.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.setitimer(signal.ITIMER_PROF, CPU_S)


def main(argv: list[str]) -> int:
    """Entry point of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        Checker(socket.socket(fileno=int(argv[1]))).run()
    except (BrokenPipeError, ConnectionResetError):
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
