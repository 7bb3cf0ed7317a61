"""A load generator for servers of server-sent events, cheap enough not to be what is measured: one thread, epoll.

`python -m bench.sides.sse_load` reads a `Load` as JSON from its input and prints a `Loaded`. Each stream keeps one
connection and asks again as soon as its answer has ended. Of most answers only the events are counted; of some, whole,
the text is kept.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

EVENT, DONE = b"data: ", b"[DONE]"
_READ_BYTES = 1 << 18
_TAIL = len(EVENT) - 1
"""Of a marker that is cut in two, so much may have come. Both have the same length."""
_CUT_S = 20.0
"""Longest silence of all streams."""


@dataclass(slots=True)
class Load:
    """What is asked for."""

    port: int
    body: dict[str, Any]
    """Of each request; a seed of its own is added."""
    streams: int
    warm_s: float
    """Not counted."""
    seconds: float
    sample_every: int = 16
    """Each so many streams, the text of the first answer is kept."""
    trace: bool = False
    """Keep when the first and the last event of each request came."""
    spread_s: float = 0.0
    """The streams begin evenly over this time: those that begin together ask together for ever."""


@dataclass(slots=True)
class Loaded:
    """What came. Events count if they came within the counted time."""

    events: int = 0
    requests: int = 0
    """Answers that ended within the counted time."""
    seconds: float = 0.0
    cpu_s: float = 0.0
    """Processor time of this process meanwhile."""
    errors: list[str] = field(default_factory=list)
    samples: list[tuple[int, str]] = field(default_factory=list)
    """Seeds and texts."""
    first_ms: list[float] = field(default_factory=list)
    """From sending a request to its first event."""
    times_ns: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By request id: when its first and its last event came, on the wall clock's scale."""
    event: str = ""
    """One event with its id line, as it came."""


class Stream:
    """One connection."""

    def __init__(self, number: int, load: Load) -> None:
        self.sock = socket.create_connection(("127.0.0.1", load.port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self._load = load
        self._number = number
        self._asked = 0
        self.seed = 0
        self.tail = b""
        self.kept: bytearray | None = None
        self.head: bytes | None = None
        self.sent_at = 0.0
        self.first_ns = 0

    def ask(self) -> None:
        """Send the next request."""
        self.seed = self._number * 1_000_003 + self._asked
        self._asked += 1
        payload = json.dumps({**self._load.body, "seed": self.seed, "stream": True}).encode()
        lines = ("POST /v1/completions HTTP/1.1", "Host: bench", "Content-Type: application/json")
        head = "\r\n".join([*lines, f"Content-Length: {len(payload)}"]) + "\r\n\r\n"
        self.tail, self.first_ns = b"", 0
        keeps = self._asked == 1 and self._number % self._load.sample_every == 0
        self.kept = bytearray() if keeps or self._load.trace else None
        self.sent_at = time.perf_counter()
        self.sock.sendall(head.encode() + payload)


class Client:
    """All streams."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._found = Loaded()
        self._selector = selectors.DefaultSelector()
        self._counting = False
        self._streams: list[Stream] = []
        self._anchor_ns = time.time_ns() - time.monotonic_ns()

    def run(self) -> Loaded:
        """Until the time is over."""
        first, pause_s = time.perf_counter(), self._load.spread_s / self._load.streams
        for number in range(self._load.streams):
            self._until(first + number * pause_s)
            stream = Stream(number, self._load)
            self._streams.append(stream)
            self._selector.register(stream.sock, selectors.EVENT_READ, stream)
            stream.ask()
        self._until(time.perf_counter() + self._load.warm_s)
        self._counting = True
        began, cpu = time.perf_counter(), time.process_time()
        self._until(began + self._load.seconds)
        self._found.seconds, self._found.cpu_s = time.perf_counter() - began, time.process_time() - cpu
        for stream in self._streams:
            if stream.kept:
                answer = bytes(stream.kept)
                self._found.samples.append((stream.seed, text_of(answer[max(0, answer.find(b"HTTP/1.1 ")) :])))
        return self._found

    def _until(self, end: float) -> None:
        while (left := end - time.perf_counter()) > 0 and not self._found.errors:
            ready = self._selector.select(min(left, _CUT_S))
            if not ready and left > _CUT_S:
                self._found.errors.append("no event came")
            for key, _ in ready:
                self._read(key.data)

    def _read(self, stream: Stream) -> None:
        data = stream.sock.recv(_READ_BYTES)
        if not data:
            self._found.errors.append(f"a stream broke off: {stream.tail!r}")
            return
        if not stream.first_ns and data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 200"):
            self._found.errors.append(data.decode(errors="replace")[-300:])
            return
        joined = stream.tail + data
        count = joined.count(EVENT)
        if stream.kept is not None:
            stream.kept += data
        if count and not stream.first_ns:
            self._first(stream, joined)
        if self._counting:
            self._found.events += count
        if DONE in joined:
            self._ended(stream)
            return
        stream.tail = joined[-_TAIL:]

    def _first(self, stream: Stream, joined: bytes) -> None:
        stream.first_ns = self._anchor_ns + time.monotonic_ns()
        if self._counting:
            self._found.first_ms.append((time.perf_counter() - stream.sent_at) * 1000)
        if not self._found.event and (at := joined.find(b"id: 0:")) >= 0:
            self._found.event = joined[at:].split(b"\n\n")[0].decode() + "\n\n"

    def _ended(self, stream: Stream) -> None:
        if self._counting:
            self._found.events -= 1  # the last one brings no token
            self._found.requests += 1
        if stream.kept is not None:
            self._keep(stream, bytes(stream.kept))
        stream.ask()

    def _keep(self, stream: Stream, answer: bytes) -> None:
        answer = answer[answer.index(b"HTTP/1.1 ") :]  # the end of the answer before may have come late
        if self._load.trace and self._counting:
            names = dict(line.partition(b": ")[::2] for line in _head(answer).lower().split(b"\r\n")[1:])
            now = self._anchor_ns + time.monotonic_ns()
            self._found.times_ns[names[b"x-request-id"].decode()] = (stream.first_ns, now)
        self._found.samples.append((stream.seed, text_of(answer)))


def text_of(answer: bytes) -> str:
    """The text of an answer, of which the end may be missing."""
    body = unchunked(answer[len(_head(answer)) + 4 :])
    lines = [line for line in body.split(b"\n")[:-1] if line.startswith(EVENT) and line != EVENT + DONE]
    return "".join(choice["text"] for line in lines for choice in json.loads(line[6:]).get("choices", ()))


def _head(answer: bytes) -> bytes:
    return answer.partition(b"\r\n\r\n")[0]


def unchunked(body: bytes) -> bytes:
    """The content of a chunked body, of which the end may be missing."""
    parts, at = [], 0
    while (line := body.find(b"\r\n", at)) > 0:
        length = int(body[at:line], 16)
        parts.append(body[line + 2 : line + 2 + length])
        at = line + length + 4
    return b"".join(parts)


if __name__ == "__main__":
    print(json.dumps(asdict(Client(Load(**json.loads(sys.stdin.read()))).run())))
