"""One run: a fleet, its clients, a schedule of faults, a quiet part in which everything must come to rest."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

from llmos.etcd import EtcdConfig
from scheduler import budget, charges, deadlines, followers, loop, reign
from tests.sim import faults, orders
from tests.sim.checks import Checks, Violation
from tests.sim.clients import SimClient
from tests.sim.etcd_cluster import MEMBERS, EtcdCluster
from tests.sim.faults import Fault
from tests.sim.network import Network
from tests.sim.nodes import Ground, Memory, SimGateway, SimProcess, SimScheduler, SimWorker
from tests.sim.orders import Order
from tests.sim.rest import look_at_rest
from tests.sim.trace import Trace
from tests.sim.vloop import NOWHERE, START, Node, VirtualLoop

SPAN_S, DENSE_SPAN_S = 5.0, 12.0
"""Clients come and faults begin within this time."""
_REMEMBERS_S = 5.0
"""Where leaders forget soon; some clients are away for longer."""
_ENTRY_BYTES = 1500
"""Of a stream that is remembered, roughly."""
_LIMIT_S = 60.0
"""So long after the last fault everything must have ended: elections, leases, learned silence and all tokens left."""
_TICK_S = 0.1
"""Twice the scheduler's: most of a quiet run would be ticks."""
_BATCH_BYTES = 3000
"""Of the journal's stream: its beginning comes in parts."""
_REST_S = 8.0
"""For what is left over to be noticed: leases of the dead, orphans, graces."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a run depends on besides the code."""

    seed: int
    schedulers: int
    workers: tuple[int, ...]
    """KV blocks of each."""
    gateways: int
    orders: tuple[Order, ...]
    faults: tuple[Fault, ...]
    span_s: float = SPAN_S
    memory: Memory = field(default_factory=Memory)


@dataclass(slots=True)
class Result:
    """What a run came to."""

    seed: int
    digest: str
    violations: list[Violation]
    counts: Counter[str]
    virtual_s: float
    steps: int
    lines: list[str] = field(default_factory=list)


def make_plan(seed: int, *, dense: bool = False) -> Plan:
    """A plan by chance; the same one for the same seed, wherever it is drawn. A `dense` one has several times as many
    faults."""
    rng = random.Random(f"{'dense' if dense else 'plan'}-{seed}")
    workers = tuple(
        rng.choice((9, 10, 12, 20)) for _ in range(rng.choice((2, 3)) if dense else rng.choice((1, 2, 2, 3)))
    )
    gateways = rng.choice((1, 2, 2, 3))
    span_s = DENSE_SPAN_S if dense else SPAN_S
    names = {
        "scheduler": ["scheduler0", "scheduler1"],
        "worker": [f"worker{number}" for number in range(len(workers))],
        "gateway": [f"gateway{number}" for number in range(gateways)],
        "member": [f"etcd{number}" for number in range(MEMBERS)],
    }
    clients = tuple(orders.draw(rng, number, span_s, gateways) for number in range(rng.choice((4, 8, 12))))
    schedule = tuple(faults.draw(rng, span_s, names, dense=dense))
    return Plan(seed, 2, workers, gateways, clients, schedule, span_s, _memory(rng))


def _memory(rng: random.Random) -> Memory:
    ttl_s = rng.choice((_REMEMBERS_S, 120.0))
    if rng.random() < 0.75:
        return Memory(ttl_s)
    return Memory(ttl_s, rng.choice((2, 4)) * _ENTRY_BYTES, rng.choice((1, 2)) * _ENTRY_BYTES)


class World:
    """Owns the loop and everything on it."""

    def __init__(self, plan: Plan, *, keep: int = 0) -> None:
        self.plan = plan
        self.rng = random.Random(f"world-{plan.seed}")
        self.loop = VirtualLoop()
        self.trace = Trace(self.loop.time, keep=keep)
        self.checks = Checks(self.loop.time, self.trace)
        self.network = Network(self.loop, random.Random(f"net-{plan.seed}"), self.trace)
        self.etcd = EtcdCluster(self.loop, self.network, random.Random(f"etcd-{plan.seed}"))
        config = EtcdConfig(endpoints=self.etcd.endpoints)
        ground = Ground(self.loop, self.network, self.checks, config, str(plan.seed), plan.memory)
        self.processes: dict[str, SimProcess] = {}
        for number in range(plan.schedulers):
            self._add(SimScheduler(ground, f"scheduler{number}", f"127.0.1.{number + 1}"))
        for number, blocks in enumerate(plan.workers):
            step_s = self.rng.choice((0.03, 0.05, 0.07))
            self._add(SimWorker(ground, f"worker{number}", f"127.0.2.{number + 1}", blocks=blocks, step_s=step_s))
        addresses = tuple(f"127.0.1.{number + 1}:1" for number in range(plan.schedulers))
        for number in range(plan.gateways):
            self._add(SimGateway(ground, f"gateway{number}", f"127.0.3.{number + 1}", schedulers=addresses))
        self.gateways = [one for one in self.processes.values() if isinstance(one, SimGateway)]
        self.clients = [SimClient(order, self.gateways, self.loop, self.checks) for order in plan.orders]

    def _add(self, process: SimProcess) -> None:
        self.processes[process.name] = process

    def names(self) -> list[str]:
        """All nodes."""
        return [*self.processes, *(member.name for member in self.etcd.members)]

    def member(self, name: str) -> Node:
        """A member of etcd."""
        return next(member for member in self.etcd.members if member.name == name)

    def revive(self, process: SimProcess) -> None:
        """Its supervisor starts it again."""
        if process.node.dead:
            process.start()

    def replace(self, process: SimProcess, incarnation: int) -> None:
        """A process that was asked to end is killed if it has not, and started again."""
        if process.incarnation == incarnation:
            process.kill()
            process.start()

    async def live(self) -> None:
        """From the first process to the check at rest."""
        etcd = asyncio.create_task(self.etcd.start(), name="etcd")
        for process in self.processes.values():
            process.start()
        for fault in self.plan.faults:
            self.loop.call_at(START + fault.at_s, faults.begin, self, fault, context=NOWHERE)
        tasks = [asyncio.create_task(client.run(), name=client.name) for client in self.clients]
        await asyncio.wait(tasks, timeout=self.plan.span_s + 2.0 + _LIMIT_S)
        for client in self.clients:
            if not client.ended:
                self.checks.fail(
                    "everything ends", f"{client.name} has not after {sum(map(len, client.tokens))} tokens"
                )
        for task in tasks:
            if task.done() and not task.cancelled() and task.exception() is not None:
                raise task.exception()  # type: ignore[misc]
            task.cancel()
        quiet_from = START + max([self.plan.span_s, *(fault.at_s + fault.lasts_s for fault in self.plan.faults)])
        await asyncio.sleep(max(0.0, quiet_from - self.loop.now) + _REST_S)
        look_at_rest(self)
        etcd.cancel()

    def run(self) -> Result:
        """The whole run, and no task left behind."""
        with _watched_log(self.checks):
            self.loop.run_until_complete(self.live())
            ended_at = self.loop.now
            digest, violations = self.trace.digest(), list(self.checks.violations)
            lines = list(self.trace.lines)
            nodes = [*self.etcd.members]
            for process in self.processes.values():
                nodes += [*process.retired, process.node]
            with mock.patch.object(logging.getLogger(), "disabled", True):
                self.loop.finish(nodes)
            self.loop.close()
        steps = self.loop.steps
        return Result(self.plan.seed, digest, violations, self.checks.counts, ended_at - START, steps, lines)


class _Bugs(logging.Handler):
    """What the services log with a traceback is a bug."""

    def __init__(self, checks: Checks) -> None:
        super().__init__(logging.ERROR)
        self.checks: Checks | None = checks

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and self.checks is not None:
            error = record.exc_info[1]
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            self.checks.fail("nothing breaks", f"{record.getMessage()}: {type(error).__name__}: {error}")


@contextmanager
def _watched_log(checks: Checks) -> Iterator[None]:
    root = logging.getLogger()
    handler, level = _Bugs(checks), root.level
    root.addHandler(handler)
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def run(plan: Plan, *, keep: int = 0) -> Result:
    """Run a plan. Process ids and host names, which records carry, are the same everywhere."""
    gc.disable()
    try:
        with (
            mock.patch.object(os, "getpid", return_value=1),
            mock.patch.object(socket, "gethostname", return_value="here"),
            mock.patch.object(loop, "_TICK_S", _TICK_S),
            mock.patch.object(reign, "_ACKNOWLEDGE_S", _TICK_S),
            mock.patch.object(reign, "LOOK_S", _TICK_S),
            mock.patch.object(followers, "_BATCH_BYTES", _BATCH_BYTES),
            # A run is too short to earn a hedge, and to learn what is late.
            mock.patch.object(budget.Budget, "take_hedge", lambda self, now: self.take(now)),
            mock.patch.object(deadlines, "_LATE_LEAST", 2.0),
        ):
            world = World(plan, keep=keep)
            with mock.patch.object(charges, "_charge", world.checks.charge):
                return world.run()
    finally:
        gc.enable()
        gc.collect(0)
