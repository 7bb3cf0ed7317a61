"""The engine's side of the checker process: start it, ask it, start it again if it dies."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Collection
from concurrent.futures import CancelledError, Future
from pathlib import Path

import msgspec

from llmos.clock import Clock
from llmos.errors import Unavailable, from_code
from worker import pipe
from worker.backend import Constraint
from worker.engine.grammar.checker import WALL_S, Order, Verdict
from worker.engine.grammar.vocabulary import PARAM

_ANSWER_S = WALL_S + 0.8
_HUNG_S = 10.0
"""A process that owes a verdict for this long is replaced; it bounds its forks itself."""
_SEND_S = 1
_READ_S = 30.0
"""For a process that starts and reads a large vocabulary."""
_Wanted = tuple[str, int, tuple[int, ...]]
"""Folder, size and end tokens of a vocabulary."""
_LOST = "The check of the constraint was lost; try again."


class _Process:
    """A checker process and what it was asked. Its reader thread ends with it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._sock, theirs = socket.socketpair()
        # A process that does not read must not hold up those who ask.
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_S, 0))
        with theirs:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "worker.engine.grammar.checker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            )
        self.read: dict[int, Future[Verdict]] = {}
        """By vocabulary: set once it was read."""
        self._asked: dict[int, tuple[float, Future[Verdict]]] = {}
        """By number: until when an answer is due, and whom to tell."""
        self._writing = threading.Lock()
        self.alive = True
        self._reader = threading.Thread(target=self._listen, name="constraint-verdicts", daemon=True)
        self._reader.start()

    def ask(self, order: Order) -> Future[Verdict]:
        """Send an order; its answer is cancelled if the process dies. Thread-safe."""
        answer: Future[Verdict] = Future()
        with self._writing:
            now = self._clock.monotonic()
            # The reader thread takes entries out meanwhile.
            if any(now > due for due, _ in list(self._asked.values())):
                self.popen.kill()
            self._asked[order.number] = now + (_READ_S if order.folder else _HUNG_S), answer
            try:
                pipe.write(self._sock, msgspec.json.encode(order))
            except OSError:
                self.popen.kill()
            if not self.alive:
                answer.cancel()
        return answer

    def end(self) -> None:
        """Kill it and wait."""
        self.popen.kill()
        self._reader.join()

    def _listen(self) -> None:
        """Hand out verdicts until the process is gone; then cancel what is still asked."""
        with self._sock, self._sock.makefile("rb") as stream:
            while (message := pipe.read(stream)) is not None:
                verdict = msgspec.json.decode(message, type=Verdict)
                self._asked.pop(verdict.number)[1].set_result(verdict)
            with self._writing:
                self.alive = False
                for _, answer in self._asked.values():
                    answer.cancel()
        self.popen.wait()


class Guard:
    """Owns the checker process, from the first vocabulary on. All methods are thread-safe."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._process: _Process | None = None
        self._vocabularies: dict[_Wanted, int] = {}
        self._numbers = iter(range(1 << 62))

    @property
    def pid(self) -> int | None:
        """Process id of the checker, if there is one."""
        return None if self._process is None else self._process.popen.pid

    def open(self, folder: Path, size: int, end_tokens: Collection[int]) -> int:
        """Let the process read a vocabulary, without waiting; returns the number to ask with. See `Vocabulary`."""
        with self._lock:
            process = self._running()
            wanted = (str(folder), size, tuple(sorted(end_tokens)))
            if wanted not in self._vocabularies:
                key = self._vocabularies[wanted] = next(self._numbers)
                process.read[key] = process.ask(_read_order(wanted, key))
            return self._vocabularies[wanted]

    def check(self, vocabulary: int, constraint: Constraint) -> None:
        """Try a constraint; takes less than 2 s once the vocabulary was read.

        Raises InvalidConstraint, or Unavailable where that is not the constraint's fault.
        """
        with self._lock:
            process = self._running()
            number = next(self._numbers)
        order = Order(
            number=number, vocabulary=vocabulary, kind=constraint.kind, text=constraint.text, texts=constraint.texts
        )
        _wait(process.read[vocabulary], _READ_S)
        _wait(process.ask(order), _ANSWER_S)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            if self._process is not None:
                self._process.end()

    def _running(self) -> _Process:
        if self._process is None or not self._process.alive:
            self._process = _Process(self._clock)
            for wanted, key in self._vocabularies.items():
                self._process.read[key] = self._process.ask(_read_order(wanted, key))
        return self._process


def _read_order(wanted: _Wanted, key: int) -> Order:
    folder, size, end_tokens = wanted
    return Order(number=key, vocabulary=key, folder=folder, size=size, end_tokens=end_tokens)


def _wait(answer: Future[Verdict], timeout_s: float) -> None:
    """Raise what a verdict says."""
    try:
        verdict = answer.result(timeout_s)
    except TimeoutError:
        raise Unavailable(_LOST, param=PARAM) from None
    except CancelledError as error:
        raise Unavailable(_LOST, param=PARAM) from error
    if verdict.code:
        raise from_code(verdict.code, verdict.message, param=PARAM)
