"""Streams to workers: dial, say hello, read frames into events, write orders once per tick, notice when they die.

A killed worker's stream ends at once (RST or EOF). A frozen or cut-off one falls silent: frames come every 500 ms, so
that almost two seconds without one mean it is lost; TCP would take minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import grpc

from llmos.clock import Clock
from llmos.errors import AttemptLost, DamagedMessage, LlmosError, StaleTerm
from llmos.internal.v1 import request_pb2, work_pb2, work_pb2_grpc
from llmos.rpc import error_from_rpc
from llmos.sealed import sealed
from llmos.v1 import fleet_pb2
from scheduler import events
from scheduler.commands import StartAttempt

log = logging.getLogger(__name__)

_STALL_S = 0.5
"""A longer delay of this process's own loop says nothing about workers."""


@dataclass(frozen=True, slots=True)
class LinkConfig:
    """How streams to workers are kept."""

    hello_timeout_s: float = 3.0
    """Longest wait for a worker's report."""
    silence_s: float = 1.75
    """A stream without a frame for this long is lost."""
    watch_s: float = 0.1
    """How often silence is looked for."""
    backoff_min_s: float = 0.05
    """Shortest pause before dialling again; jittered, doubled each time."""
    backoff_max_s: float = 1.0
    """Longest pause."""
    ack_frames: int = 8
    """Frames after which an acknowledgement goes without waiting for orders."""


@dataclass(frozen=True, slots=True)
class LinkContext:
    """What all links of one leader share."""

    scheduler_id: str
    term: Callable[[], int]
    connect: Callable[[str], grpc.aio.Channel]
    post: Callable[[events.Event], Awaitable[None]]
    post_now: Callable[[events.Event], None]
    refused: Callable[[], None]
    """A worker has seen a higher term: this leader's reign is over."""
    keep_spans: Callable[[Iterable[fleet_pb2.Span]], None]
    clock: Clock
    rng: random.Random
    config: LinkConfig


class WorkLink:
    """The stream to one worker, and again after every break until `run` is cancelled. Orders of a broken one are lost:
    the core learns of the break and decides anew."""

    def __init__(self, worker_id: str, address: str, context: LinkContext) -> None:
        self.worker_id = worker_id
        self.channel: grpc.aio.Channel | None = None
        """Open while the worker is attached; owned by the link."""
        self._address = address
        self._context = context
        self._batch = work_pb2.AttachRequest()
        """The next message. Dispatches are written into it: a long prompt is copied once."""
        self._wake = asyncio.Event()
        self._received = 0
        self._acknowledged = 0
        self._heard_at = 0.0
        self._busy = False

    def order(self, command: work_pb2.Command) -> None:
        """Collect an order for the next message. Dropped if the worker is not attached."""
        if self.channel is not None:
            self._batch.commands.append(command)

    def dispatch(self, start: StartAttempt, trace: request_pb2.TraceContext | None) -> None:
        """Collect a dispatch."""
        if self.channel is not None:
            start.write(self._batch.commands.add().dispatch, trace)

    def flush(self) -> None:
        """Send what was collected, or an acknowledgement if one is due."""
        if self._batch.commands or self._received > self._acknowledged:
            self._wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        config, rng = self._context.config, self._context.rng
        pause = config.backoff_min_s
        while True:
            attached = False
            try:
                attached = await self._attend()
            except Exception:  # a bug; the worker must not be lost to it for as long as this leader leads
                log.exception("the link to worker %s met a bug", self.worker_id)
            pause = config.backoff_min_s if attached else min(2 * pause, config.backoff_max_s)
            await asyncio.sleep(pause * rng.uniform(0.5, 1.5))

    async def _attend(self) -> bool:
        """One stream from beginning to end; whether the worker answered at all."""
        channel = self._context.connect(self._address)
        attached = False
        reason: Exception = AttemptLost("closed")
        try:
            stub: Any = work_pb2_grpc.WorkStub(sealed(channel))
            call = stub.Attach()
            report = await self._greet(call)
            attached = True
            self._begin(channel)
            await self._context.post(events.WorkerAttached(self.worker_id, report))
            await self._converse(call)
        except (LlmosError, grpc.aio.AioRpcError, TimeoutError, asyncio.InvalidStateError) as error:
            reason = self._failed(error)
        finally:
            self.channel = None
            if attached:
                log.warning("worker %s lost: %s", self.worker_id, reason)
                damaged = isinstance(reason, DamagedMessage)
                self._context.post_now(events.WorkerDetached(self.worker_id, str(reason), damaged))
            # Cancelled in the middle: the channel must not outlive its owner.
            await asyncio.shield(channel.close())
        return attached

    def _failed(self, error: Exception) -> Exception:
        typed = error_from_rpc(error) if isinstance(error, grpc.aio.AioRpcError) else error
        if isinstance(typed, StaleTerm):
            self._context.refused()
        return typed if str(typed) else AttemptLost(type(typed).__name__)

    async def _greet(self, call: Any) -> work_pb2.WorkerReport:
        hello = work_pb2.SchedulerHello(scheduler_id=self._context.scheduler_id, worker_id=self.worker_id)
        async with asyncio.timeout(self._context.config.hello_timeout_s):
            await call.write(
                work_pb2.AttachRequest(term=self._context.term(), commands=[work_pb2.Command(hello=hello)])
            )
            answer = await call.read()
        if answer is None:
            raise DamagedMessage("the worker's report came damaged")
        if answer is grpc.aio.EOF:
            # The status tells why; reading it raises.
            code = await call.code()
            if code is not grpc.StatusCode.OK:
                await _raise_status(call)
            raise AttemptLost("the worker closed the stream without a report")
        if answer.WhichOneof("message") != "report":
            raise AttemptLost("the worker's first message was no report")
        report: work_pb2.WorkerReport = answer.report
        if report.worker_id != self.worker_id:
            raise AttemptLost("another worker answers at this address")
        return report

    def _begin(self, channel: grpc.aio.Channel) -> None:
        log.info("attached to worker %s", self.worker_id)
        self.channel = channel
        self._batch = work_pb2.AttachRequest()
        self._received = self._acknowledged = 0
        self._heard_at = self._context.clock.monotonic()

    async def _converse(self, call: Any) -> None:
        """Read, write and watch until one of them fails; that ends the stream."""
        tasks = [
            asyncio.create_task(self._read(call), name=f"work-read-{self.worker_id}"),
            asyncio.create_task(self._write(call), name=f"work-write-{self.worker_id}"),
            asyncio.create_task(self._watch(), name=f"work-watch-{self.worker_id}"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                # grpc.aio reports a call that ended by itself as a cancellation of whoever waits on it.
                if not task.cancelled():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            call.cancel()

    async def _read(self, call: Any) -> None:
        while (answer := await call.read()) is not grpc.aio.EOF:
            if answer is None or answer.WhichOneof("message") != "frame":
                raise DamagedMessage("the worker sent a damaged frame")
            frame = answer.frame
            if frame.sequence != self._received + 1:
                raise AttemptLost(f"frame {frame.sequence} follows {self._received}")
            self._heard_at = self._context.clock.monotonic()
            if frame.spans:
                self._context.keep_spans(frame.spans)
            # While the core's queue is full, the worker waits too: its frames are not read. That is not its silence.
            self._busy = True
            await self._context.post(events.WorkerFrame(self.worker_id, frame))
            self._busy = False
            self._received = frame.sequence
            if self._received - self._acknowledged >= self._context.config.ack_frames:
                self._wake.set()
        await _raise_status(call)

    async def _write(self, call: Any) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            message, self._batch = self._batch, work_pb2.AttachRequest()
            self._acknowledged = self._received
            message.term, message.acknowledged = self._context.term(), self._acknowledged
            await call.write(message)

    async def _watch(self) -> None:
        """Notice silence. If this process itself stood still, the worker gets a fresh start."""
        config, clock = self._context.config, self._context.clock
        last = clock.monotonic()
        while True:
            await asyncio.sleep(config.watch_s)
            now = clock.monotonic()
            if self._busy or now - last > config.watch_s + _STALL_S:
                self._heard_at = now
            last = now
            if now - self._heard_at > config.silence_s:
                raise AttemptLost(f"silent for {now - self._heard_at:.1f} s")


async def _raise_status(call: Any) -> None:
    """Raise what the call ended with; returns if it ended well."""
    code, details = await call.code(), await call.details()
    if code is grpc.StatusCode.OK:
        return
    raise grpc.aio.AioRpcError(code, await call.initial_metadata(), await call.trailing_metadata(), details)


class WorkerLinks:
    """Links by worker id, each with its task."""

    def __init__(self, context: LinkContext) -> None:
        self._context = context
        self._links: dict[str, tuple[WorkLink, asyncio.Task[None]]] = {}
        self._touched: dict[WorkLink, None] = {}
        """In order, unlike a set: the same run is the same again."""
        self._closing: set[asyncio.Task[None]] = set()

    def get(self, worker_id: str) -> WorkLink | None:
        """The link to a worker."""
        entry = self._links.get(worker_id)
        return entry[0] if entry is not None else None

    def dial(self, worker_id: str, address: str) -> None:
        """Begin to keep a stream to a worker."""
        self.hang_up(worker_id)
        link = WorkLink(worker_id, address, self._context)
        task = asyncio.create_task(link.run(), name=f"work-link-{worker_id}")
        self._links[worker_id] = (link, task)

    def hang_up(self, worker_id: str) -> None:
        """Stop keeping it."""
        entry = self._links.pop(worker_id, None)
        if entry is not None:
            task = entry[1]
            task.cancel()
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def order(self, worker_id: str, command: work_pb2.Command) -> None:
        """Collect an order."""
        entry = self._links.get(worker_id)
        if entry is not None:
            entry[0].order(command)
            self._touched[entry[0]] = None

    def dispatch(self, start: StartAttempt, trace: request_pb2.TraceContext | None) -> None:
        """Collect a dispatch."""
        entry = self._links.get(start.worker_id)
        if entry is not None:
            entry[0].dispatch(start, trace)
            self._touched[entry[0]] = None

    def flush(self) -> None:
        """Send what was collected."""
        for link in self._touched:
            link.flush()
        self._touched.clear()

    def acknowledge(self) -> None:
        """Acknowledge frames that no order has carried an acknowledgement for; about every tick."""
        for link, _ in self._links.values():
            link.flush()

    async def close(self) -> None:
        """Hang up on all and wait until that is done."""
        for worker_id in list(self._links):
            self.hang_up(worker_id)
        tasks = list(self._closing)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2.0):
                await asyncio.gather(*tasks, return_exceptions=True)
