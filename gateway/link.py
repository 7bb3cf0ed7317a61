"""The stream to the leading scheduler: finds it, follows it, and says again after a break what is unfinished.

One reader hands every frame to the receiver in the order of arrival, one writer empties the outbox. A scheduler of a
term below the highest seen is never listened to. The link itself holds no request: its receiver does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from gateway.leader import answers, leads
from gateway.outbox import Outbox
from llmos.clock import Clock, SystemClock
from llmos.errors import LlmosError, NotLeader, StaleTerm, Unavailable
from llmos.internal.v1 import requests_pb2, requests_pb2_grpc
from llmos.rpc import open_channel
from llmos.sealed import sealed
from llmos.v1 import fleet_pb2

log = logging.getLogger(__name__)

_SPANS_PER_MESSAGE = 512
_SPANS_EVERY_S = 0.25
_ACK_FRAMES = 8
"""Frames after which an acknowledgement goes at once; well below the scheduler's window."""


@dataclass(frozen=True, slots=True)
class LinkConfig:
    """How a gateway finds its scheduler."""

    schedulers: tuple[str, ...]
    """host:port of the schedulers; any one that lives can name the leader."""
    hello_timeout_s: float = 3.0
    """Longest wait for a scheduler to answer that it leads, or who does."""
    probe_every_s: float = 1.0
    """Pause between two questions whether the leader still answers."""
    probe_timeout_s: float = 4.0
    """Longest wait for such an answer; past it the leader counts as frozen."""
    ask_every_s: float = 0.5
    """Pause between two questions whether another scheduler leads by now, and longest wait for answers."""
    write_timeout_s: float = 10.0
    """Longest wait for the stream to take a message; past it the stream counts as lost."""
    backoff_min_s: float = 0.05
    """Shortest pause after every scheduler was tried in vain; jittered, doubled each time."""
    backoff_max_s: float = 0.5
    """Longest pause."""
    outbox_limit: int = 8192
    """Most messages that wait for the stream."""


class Receiver(Protocol):
    """Who lives above the link. Called from the link's reader; must not block."""

    def on_connected(self, term: int) -> Iterable[requests_pb2.Submit]:
        """A leader of this term listens; returns what is unfinished, with `resume`, to be submitted to it."""
        ...

    def on_lost(self) -> None:
        """The leader doesn't answer any more; the link looks for the next one."""
        ...

    def on_catalogue(self, catalogue: requests_pb2.Catalogue, term: int) -> None:
        """Models changed."""
        ...

    def on_frame(self, frame: requests_pb2.GatewayFrame) -> None:
        """Output arrived."""
        ...


class _Stopped(Exception):
    """The scheduler ended the stream, or the link gave it up."""


class _Frozen(Exception):
    """The scheduler does not answer any more."""


class Link:
    """One per gateway. `run` it in a task; submit, cancel and finish from anywhere on its loop."""

    def __init__(
        self,
        config: LinkConfig,
        node: fleet_pb2.Node,
        *,
        connect: Callable[[str], grpc.aio.Channel] = open_channel,
        spans: Callable[[int], Sequence[fleet_pb2.Span]] = lambda limit: (),
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """`node` is how the gateway introduces itself, `spans` drains finished ones for the scheduler's ring."""
        self._config = config
        self._node = node
        self._connect = connect
        self._spans = spans
        self._clock = clock or SystemClock()
        self._rng = rng or random.SystemRandom()
        self._outbox = Outbox(config.outbox_limit)
        self._wake = asyncio.Event()
        self._broken = asyncio.Event()
        self._channel: grpc.aio.Channel | None = None
        self._hint = ""
        self._term = 0
        self._lost_at: float | None = None
        self._sequence = 0
        self._counts = dict.fromkeys(
            ("connects", "frames_corrupt", "frames_duplicate", "frames_missed", "frames_taken", "restarts", "tries"), 0
        )

    @property
    def connected(self) -> bool:
        """A leader listens."""
        return self._channel is not None

    @property
    def term(self) -> int:
        """Highest term seen; 0 before the first leader."""
        return self._term

    @property
    def lost_for_s(self) -> float | None:
        """Seconds since the last leader was lost; 0 while one listens, None before the first."""
        if self._channel is not None:
            return 0.0
        return None if self._lost_at is None else self._clock.monotonic() - self._lost_at

    def counters(self) -> Mapping[str, int]:
        """Totals since the start, and the outbox's length."""
        return {**self._counts, "outbox": len(self._outbox)}

    def submit(self, submit: requests_pb2.Submit) -> None:
        """Hand a request over, if a leader listens; else `on_connected` does it later. Never blocks."""
        if self.connected:
            self._say(requests_pb2.ExchangeRequest(submit=submit))

    def cancel(self, request_id: str, reason: str, claim: int = 0) -> None:
        """Stop a request; kept for the next leader if none listens now."""
        cancel = requests_pb2.Cancel(request_id=request_id, reason=reason, claim=claim)
        self._say(requests_pb2.ExchangeRequest(cancel=cancel))

    def finish(self, request_id: str, choice: int, keep_until: int) -> None:
        """End a choice early: tokens from `keep_until` on aren't wanted."""
        finish = requests_pb2.Finish(request_id=request_id, choice=choice, keep_until=keep_until)
        if self.connected:
            self._say(requests_pb2.ExchangeRequest(finish=finish))

    def restart(self) -> None:
        """Output was lost or damaged: open a new connection, which asks for all that is unfinished."""
        self._counts["restarts"] += 1
        self._broken.set()

    def leader_channel(self) -> grpc.aio.Channel:
        """The leader's channel, owned by the link. Raises Unavailable if there is none."""
        if self._channel is None:
            raise Unavailable("No scheduler leads at the moment; try again.", retry_after_s=1.0)
        return self._channel

    async def run(self, receiver: Receiver) -> None:
        """Stay connected to whoever leads, until cancelled."""
        pause = self._config.backoff_min_s
        while True:
            connects = self._counts["connects"]
            for address in self._round():
                await self._try(address, receiver)
            if self._counts["connects"] > connects:
                pause = self._config.backoff_min_s
            await asyncio.sleep(pause * self._rng.uniform(0.5, 1.5))
            pause = min(2 * pause, self._config.backoff_max_s)

    def _round(self) -> Iterable[str]:
        """The configured schedulers in random order; where one names the leader, that one next, once."""
        order = list(self._config.schedulers)
        self._rng.shuffle(order)
        hinted: set[str] = set()
        while self._hint not in {"", *hinted} or order:
            if self._hint and self._hint not in hinted:
                hinted.add(self._hint)
                address, self._hint = self._hint, ""
                if address in order:
                    order.remove(address)
            else:
                address = order.pop()
            yield address

    async def _try(self, address: str, receiver: Receiver) -> None:
        self._counts["tries"] += 1
        try:
            await self._attend(address, receiver)
        except NotLeader as answer:
            self._hint = answer.leader_address
        except (LlmosError, _Stopped, TimeoutError, asyncio.InvalidStateError) as error:
            log.debug("scheduler %s: %s", address, error)
        except (_Frozen, grpc.aio.AioRpcError) as error:
            log.debug("scheduler %s: %s", address, error.code().name if isinstance(error, grpc.RpcError) else error)
            # The others are asked first: another one may lead by now, and a frozen one costs a whole hello timeout.
            self._hint = "" if self._hint == address else self._hint

    async def _attend(self, address: str, receiver: Receiver) -> None:
        """Hold a stream to one scheduler for as long as it leads."""
        channel = self._connect(address)
        try:
            stub: Any = requests_pb2_grpc.RequestsStub(sealed(channel))
            call = stub.Exchange()
            async with asyncio.timeout(self._config.hello_timeout_s):
                term = await self._greet(call)
            self._begin(channel, term, receiver)
            # The leader is tried first after a short break, as it most often leads on.
            self._hint = address
            try:
                await self._converse(call, address, channel, receiver)
            finally:
                self._end(receiver)
        finally:
            await channel.close()

    async def _greet(self, call: Any) -> int:
        hello = requests_pb2.GatewayHello(node=self._node, highest_term=self._term)
        await call.write(requests_pb2.ExchangeRequest(hello=hello))
        answer = await call.read()
        if answer is grpc.aio.EOF:
            raise _Stopped("it closed without an answer")
        if answer is None:
            raise _Stopped("it sent a damaged answer")
        kind = answer.WhichOneof("message")
        if kind == "not_leader":
            raise NotLeader("another scheduler leads", leader_address=answer.not_leader.leader_address)
        if kind != "welcome":
            raise _Stopped(f"it answered {kind} instead of welcome")
        if answer.welcome.term < self._term:
            raise StaleTerm(f"it leads in term {answer.welcome.term}, below {self._term}")
        return int(answer.welcome.term)

    def _begin(self, channel: grpc.aio.Channel, term: int, receiver: Receiver) -> None:
        log.info("connected to the leader of term %d", term)
        self._term, self._channel, self._sequence = term, channel, 0
        self._counts["connects"] += 1
        self._broken.clear()
        for submit in receiver.on_connected(term):
            self.submit(submit)

    def _end(self, receiver: Receiver) -> None:
        log.info("lost the leader of term %d", self._term)
        self._channel = None
        self._lost_at = self._clock.monotonic()
        self._outbox.reset()
        receiver.on_lost()

    async def _converse(self, call: Any, address: str, channel: grpc.aio.Channel, receiver: Receiver) -> None:
        """Read, write and watch until one of them fails; the first failure ends all."""
        tasks = [
            asyncio.create_task(self._read(call, receiver), name="link-read"),
            asyncio.create_task(self._write(call), name="link-write"),
            asyncio.create_task(self._watch(channel), name="link-watch"),
            asyncio.create_task(self._look_around(address), name="link-look-around"),
            asyncio.create_task(self._broken.wait(), name="link-broken"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                # grpc.aio reports a call that it ended by itself as a cancellation of whoever waits on it.
                if not task.cancelled():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            call.cancel()
        raise _Stopped("the stream ended")

    async def _read(self, call: Any, receiver: Receiver) -> None:
        while (message := await call.read()) is not grpc.aio.EOF:
            if message is None:  # grpc.aio's word for bytes that are no such message
                self._counts["frames_corrupt"] += 1
                raise _Stopped("it sent a damaged frame")
            match message.WhichOneof("message"):
                case "frame":
                    self._on_frame(message.frame, receiver)
                case "catalogue":
                    receiver.on_catalogue(message.catalogue, self._term)
                case "not_leader":
                    raise NotLeader("it leads no more", leader_address=message.not_leader.leader_address)

    def _on_frame(self, frame: requests_pb2.GatewayFrame, receiver: Receiver) -> None:
        if frame.sequence <= self._sequence:
            self._counts["frames_duplicate"] += 1
            return
        if frame.sequence > self._sequence + 1:
            self._counts["frames_missed"] += frame.sequence - self._sequence - 1
            self.restart()
        self._counts["frames_taken"] += 1
        self._sequence = frame.sequence
        receiver.on_frame(frame)
        self._outbox.acknowledge(frame.sequence)
        # Fewer wait for the next message, or the next look at the spans.
        if frame.sequence % _ACK_FRAMES == 0:
            self._wake.set()

    async def _write(self, call: Any) -> None:
        while True:
            while (message := self._outbox.pop()) is not None:
                await self._send(call, message)
            spans = self._spans(_SPANS_PER_MESSAGE)
            if spans:
                await self._send(call, requests_pb2.ExchangeRequest(spans=requests_pb2.Spans(spans=spans)))
            with contextlib.suppress(TimeoutError):  # time to look for finished spans
                async with asyncio.timeout(_SPANS_EVERY_S):
                    await self._wake.wait()
            self._wake.clear()

    async def _watch(self, channel: grpc.aio.Channel) -> None:
        while True:
            if not await answers(channel, self._config.probe_timeout_s):
                raise _Frozen("it does not answer any more")
            await asyncio.sleep(self._config.probe_every_s)

    async def _look_around(self, leader: str) -> None:
        """Until another scheduler leads in a later term than ours does, which ours may be unable to say."""
        channels = {address: self._connect(address) for address in self._config.schedulers if address != leader}
        wait_s = self._config.ask_every_s
        try:
            while True:
                await asyncio.sleep(wait_s)
                terms = await asyncio.gather(*(leads(channel, wait_s) for channel in channels.values()))
                for address, term in zip(channels, terms, strict=True):
                    if term > self._term:
                        raise NotLeader("another scheduler leads", leader_address=address)
        finally:
            await asyncio.gather(*(channel.close() for channel in channels.values()))

    async def _send(self, call: Any, message: requests_pb2.ExchangeRequest) -> None:
        async with asyncio.timeout(self._config.write_timeout_s):
            await call.write(message)

    def _say(self, message: requests_pb2.ExchangeRequest) -> None:
        if not self._outbox.push(message):
            self.restart()
        self._wake.set()
