"""One leadership, from election to deposition: the core with its loop, its streams and its watch on the members."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass

import grpc

from llmos.clock import Clock
from llmos.errors import EtcdError
from llmos.etcd import EtcdClient
from llmos.internal.v1 import requests_pb2
from llmos.telemetry import Telemetry
from llmos.v1 import fleet_pb2
from scheduler import events
from scheduler.allocation.intent import Intent
from scheduler.commands import (
    AnswerTakeUp,
    CloseStream,
    Command,
    Dial,
    HangUp,
    Order,
    SendCatalogue,
    SendClass,
    SendFailure,
    SendJournal,
    SendOutput,
    StartAttempt,
    WriteAssignment,
)
from scheduler.core import Core
from scheduler.followers import FollowerDesk
from scheduler.gateways import GatewayDesk
from scheduler.inquiries import Inquiries
from scheduler.loop import Loop
from scheduler.membership import Membership
from scheduler.policy import Policy
from scheduler.service_log import ServiceLog
from scheduler.span_watch import LOOK_S, CoreView, SpanWatch
from scheduler.spans import StageSpans
from scheduler.work_client import LinkConfig, LinkContext, WorkerLinks

log = logging.getLogger(__name__)

_ACKNOWLEDGE_S = 0.05
_BACKLOG = 256
_COMPARE_S = 0.5


@dataclass(frozen=True, slots=True)
class ReignContext:
    """What every reign of this process works with."""

    scheduler_id: str
    policy: Policy
    links: LinkConfig
    gateway_buffer_bytes: int
    etcd: EtcdClient
    connect: Callable[[str], grpc.aio.Channel]
    telemetry: Telemetry
    keep_spans: Callable[[Iterable[fleet_pb2.Span]], None]
    refused: Callable[[], None]
    """A peer has seen a higher term. Must not wait."""
    clock: Clock
    rng: random.Random
    inheritance: Callable[[int], events.JournalInherited]
    """What is known of the last leader's journal, for a reign of that term."""


class Reign:
    """Started by `run`; everything ends with it. Implements `scheduler.loop.Carrier`."""

    def __init__(self, term: int, context: ReignContext) -> None:
        self.core = Core(context.scheduler_id, term, context.policy, context.clock.monotonic())
        self.loop = Loop(self.core, self, context.clock)
        self.inquiries = Inquiries(self.loop)
        self.followers = FollowerDesk(self.loop, lambda: self.term)
        self.loop.post_now(context.inheritance(term))
        self.gateways = GatewayDesk(self._welcome, context.keep_spans, context.gateway_buffer_bytes)
        self.workers = WorkerLinks(self._link_context(context))
        self.leader_address = ""
        """Who leads next, once that is known; gateways are told at the end."""
        self._context = context
        self._spans = StageSpans(context.telemetry)
        self.watch = SpanWatch(CoreView(self.core.state), context.clock)
        self.intent = Intent(context.etcd, self.loop.post_now, lambda: self.term)
        self._membership = Membership(context.etcd, self.loop.post_now, context.rng)
        self.service = ServiceLog(context.etcd, lambda: self.term, self.core.state.waiting.service, self.loop.post_now)

    @property
    def term(self) -> int:
        """The term that new dispatches carry."""
        return self.core.state.term

    def raise_term(self, term: int) -> None:
        """This leader was elected again."""
        if term > self.term:
            self.loop.post_now(events.TermRaised(term))

    async def run(self) -> None:
        """Until cancelled."""
        self._context.telemetry.watch(self.watch)
        self._spans.progressed = self.watch.progressed
        try:
            async with asyncio.TaskGroup() as group:
                for name, work in self._tasks():
                    group.create_task(work, name=f"reign-{name}")
        finally:
            await asyncio.shield(self._end())

    def _tasks(self) -> Iterable[tuple[str, Coroutine[None, None, None]]]:
        yield "loop", self.loop.run()
        yield "tick", self.loop.tick()
        yield "members", self._watch_members()
        yield "acknowledge", self._acknowledge()
        yield "service", self.service.run()
        yield "promises", self._watch_promises()
        yield "assignments", self.intent.write()
        yield "stalls", self._watch_spans()
        yield "slow", self._compare_workers()

    async def _end(self) -> None:
        self.followers.close()
        await self.gateways.leave(requests_pb2.NotLeader(leader_address=self.leader_address))
        await self.workers.close()
        self._spans.abandon("not_leader")
        self._context.telemetry.unwatch(self.watch)

    async def _watch_members(self) -> None:
        backoff = self._context.etcd.backoff()
        while True:
            try:
                await self._membership.run()
            except EtcdError as error:
                log.error("members cannot be watched: %s", error.message)
            await asyncio.sleep(backoff.next_s())

    async def _watch_promises(self) -> None:
        backoff = self._context.etcd.backoff()
        while True:
            try:
                await self.intent.watch()
            except EtcdError as error:
                log.error("allocations cannot be watched: %s", error.message)
            await asyncio.sleep(backoff.next_s())

    async def _watch_spans(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            # Events that wait to be handled may be the very progress that is missed.
            if len(self.loop) < _BACKLOG:
                for stall in self.watch.look():
                    self.loop.post_now(stall)

    async def _compare_workers(self) -> None:
        while True:
            await asyncio.sleep(_COMPARE_S)
            for finding in self.watch.compare():
                self.loop.post_now(finding)

    async def _acknowledge(self) -> None:
        while True:
            await asyncio.sleep(_ACKNOWLEDGE_S)
            self.workers.acknowledge()
            for stream_id in self.gateways.drop_unheard(self._context.clock.monotonic()):
                self.loop.post_now(events.GatewayLost(stream_id))

    def _link_context(self, context: ReignContext) -> LinkContext:
        return LinkContext(
            scheduler_id=context.scheduler_id,
            term=lambda: self.term,
            connect=context.connect,
            post=self.loop.post,
            post_now=self.loop.post_now,
            refused=context.refused,
            keep_spans=context.keep_spans,
            clock=context.clock,
            rng=context.rng,
            config=context.links,
        )

    def _welcome(self) -> requests_pb2.Welcome:
        return requests_pb2.Welcome(term=self.term, scheduler_id=self._context.scheduler_id)

    # Carrier

    def carry(self, command: Command) -> None:
        """See `Carrier`."""
        kind = type(command)
        if kind is SendOutput:
            assert isinstance(command, SendOutput)
            self.gateways.output(command.stream_id, command.output)
            return
        if kind is StartAttempt:
            assert isinstance(command, StartAttempt)
            self.workers.dispatch(command, self._spans.started(command))
            return
        self._spans.observe(command)
        match command:
            case Order():
                self.workers.order(command.worker_id, command.command)
            case SendFailure():
                self.gateways.failure(command.stream_id, command.failure)
            case SendClass():
                self.gateways.class_change(command.stream_id, command.change)
            case SendCatalogue():
                self.gateways.catalogue(command.stream_id, command.catalogue)
            case AnswerTakeUp():
                self.inquiries.answer(command)
            case SendJournal():
                self.followers.send(command)
            case CloseStream():
                self.gateways.close(command.stream_id)
            case Dial():
                self.workers.dial(command.worker_id, command.address)
            case HangUp():
                self.workers.hang_up(command.worker_id)
                self.watch.forget(command.worker_id)
            case WriteAssignment():
                self.intent.assign(command.record)

    def flush(self) -> None:
        """See `Carrier`."""
        for stream_id in self.gateways.flush():
            self.loop.post_now(events.GatewayLost(stream_id))
        self.workers.flush()
