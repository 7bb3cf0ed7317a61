"""A stream with a sink: what it takes at once comes no second time, and nothing overtakes what waits."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from gateway.stream import Stream, StreamLimits
from gateway.text.choice import ChoiceText
from gateway.text.tokenizer import ByteTokenizer
from gateway.trace import RequestTrace
from gateway.transcript import Shape, Transcript
from gateway.types import Delta, Done, Event, Started
from llmos.internal.v1 import request_pb2, requests_pb2
from llmos.telemetry import Telemetry
from tests.fakes.clock import ManualClock
from tests.fakes.scheduler import LENGTH, output


class Leader:
    """An uplink that notes cancellations."""

    def __init__(self) -> None:
        self.cancelled: list[str] = []

    def submit(self, submit: requests_pb2.Submit) -> None: ...

    def cancel(self, request_id: str, reason: str, claim: int = 0) -> None:
        self.cancelled.append(reason)

    def finish(self, request_id: str, choice: int, keep_until: int) -> None: ...

    def restart(self) -> None: ...


@dataclass
class Reader:
    """Reads a stream, and is its sink; takes deltas only while `takes`."""

    stream: Stream
    takes: bool = True
    text: str = ""
    pushed: int = 0
    events: list[Event] = field(default_factory=list)

    def push(self, delta: Delta) -> bool:
        if self.takes:
            self.pushed += 1
            self.text += delta.text
        return self.takes

    async def read(self) -> None:
        async for event in self.stream.events():
            self.events.append(event)
            if isinstance(event, Delta):
                self.text += event.text
                await asyncio.sleep(0)  # a client that takes its time: what comes meanwhile must not overtake
            elif isinstance(event, Started):
                self.stream.feed(self)


def stream() -> Stream:
    clock, tokenizer = ManualClock(), ByteTokenizer()
    telemetry = Telemetry("gateway", "g", clock=clock)
    started = Started("r", "tiny", "v", 1, 1, 1)
    shape = Shape(1, 100, 256, False)
    transcript = Transcript(
        shape, lambda: ChoiceText(tokenizer.detokenizer(continuation=False), ()), tokenizer.token_bytes
    )
    trace = RequestTrace(telemetry, telemetry.start("root"), "r")
    made = Stream(
        request_pb2.Request(request_id="r", tenant="t"),
        started,
        transcript,
        trace,
        uplink=Leader(),
        clock=clock,
        deadline=clock.monotonic() + 60,
        limits=StreamLimits(1 << 20, 4),
        on_end=lambda stream, error: None,
    )
    made.begin(())
    return made


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_waiting_readers_sink_gets_deltas_at_once() -> None:
    subject = stream()
    reader = Reader(subject)
    task = asyncio.create_task(reader.read())
    await turns()
    for index, character in enumerate("abc"):
        subject.take(output("r", index, character))
    assert reader.text == "abc"
    subject.take(output("r", 3, "d", finish=LENGTH))
    await task
    assert reader.text == "abcd"
    assert [type(event) for event in reader.events] == [Started, Done]


async def test_order_is_kept_whatever_the_sink_takes() -> None:
    subject = stream()
    reader = Reader(subject)
    task = asyncio.create_task(reader.read())
    await turns()
    said = "the quick brown fox jumps over the lazy dog"
    for index, character in enumerate(said):
        reader.takes = index % 3 != 1
        subject.take(output("r", index, character, finish=LENGTH if index == len(said) - 1 else 0))
        if index % 4 == 0:
            await turns()
    await task
    assert reader.text == said
    assert 0 < reader.pushed < len(said)


async def test_nothing_is_pushed_before_the_reader_waits() -> None:
    subject = stream()
    reader = Reader(subject)
    subject.feed(reader)
    subject.take(output("r", 0, "a"))
    assert reader.pushed == 0
    task = asyncio.create_task(reader.read())
    await turns()
    subject.take(output("r", 1, "b", finish=LENGTH))
    await task
    assert (reader.text, reader.pushed) == ("ab", 1)
