"""What the world does to a fleet: drawn from a seed, each with its end, all over before the run's quiet part."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmos.internal.v1 import request_pb2, work_pb2
from scheduler import events
from tests.sim.nodes import SimProcess, SimScheduler, SimWorker
from tests.sim.vloop import NOWHERE, Node

if TYPE_CHECKING:
    from tests.sim.world import World


@dataclass(frozen=True, slots=True)
class Fault:
    """One event: a value, so that a failing plan can be printed and shortened."""

    kind: str
    at_s: float
    lasts_s: float
    target: str = ""
    other: str = ""


Apply = Callable[["World", Fault], Callable[[], None] | None]
"""Begins a fault; returns what ends it, if anything does."""


def _process(world: World, fault: Fault) -> SimProcess:
    return world.processes[fault.target]


def _kill(world: World, fault: Fault) -> Callable[[], None]:
    process = _process(world, fault)
    process.kill()
    return lambda: world.revive(process)


def _freeze(world: World, fault: Fault) -> Callable[[], None]:
    node = _process(world, fault).node
    world.loop.freeze(node)
    return lambda: world.loop.thaw(node)


def _terminate(world: World, fault: Fault) -> Callable[[], None]:
    process = _process(world, fault)
    incarnation = process.incarnation
    world.loop.call_soon(process.stop.set, context=process.node.context)
    return lambda: world.replace(process, incarnation)


def _crash_engine(world: World, fault: Fault) -> None:
    process = _process(world, fault)
    if isinstance(process, SimWorker) and process.engine is not None:
        process.engine.crash()


def _slow_engine(world: World, fault: Fault) -> Callable[[], None] | None:
    process = _process(world, fault)
    if not isinstance(process, SimWorker) or process.engine is None:
        return None
    engine = process.engine
    engine.factor = 10.0

    def end() -> None:
        engine.factor = 1.0

    return end


def _hang_engine(world: World, fault: Fault) -> None:
    process = _process(world, fault)
    if isinstance(process, SimWorker) and process.engine is not None:
        process.engine.hangs_until = world.loop.now + fault.lasts_s


def _partition(world: World, fault: Fault) -> Callable[[], None]:
    world.network.block(fault.target, fault.other)
    return lambda: world.network.unblock(fault.target, fault.other)


def _cut(world: World, fault: Fault) -> Callable[[], None]:
    """Both directions."""
    world.network.block(fault.target, fault.other)
    world.network.block(fault.other, fault.target)

    def end() -> None:
        world.network.unblock(fault.target, fault.other)
        world.network.unblock(fault.other, fault.target)

    return end


def _isolate(world: World, fault: Fault) -> Callable[[], None]:
    """One node from everybody, etcd included."""
    others = [name for name in world.names() if name != fault.target]
    for name in others:
        world.network.block(fault.target, name)
        world.network.block(name, fault.target)

    return lambda: _heal(world, fault.target, others)


def _kill_request(world: World, fault: Fault) -> None:
    """An operator ends a request, and the connections break before its gateway hears of it."""
    for process in world.processes.values():
        reign = process.process.seat.reign if isinstance(process, SimScheduler) and process.process else None
        if reign is None or process.node.dead or not reign.core.state.requests:
            continue
        request_id = world.rng.choice(sorted(reign.core.state.requests))
        for client in world.clients:
            client.killed = client.killed or client.inner_id == request_id.partition("~")[0]
        reign.loop.post_now(events.Killed(request_id))
        for gateway in world.gateways:
            world.loop.call_later(0.001, world.network.reset, gateway.name, process.name, context=NOWHERE)


def _lose_piece(world: World, fault: Fault) -> None:
    """A worker's next piece of output never leaves it."""
    process = _process(world, fault)
    if isinstance(process, SimWorker) and process.core is not None:
        outbox = process.core._outbox
        whole = outbox.add

        def lose(output: object) -> None:
            outbox.add = whole  # type: ignore[method-assign]

        outbox.add = lose  # type: ignore[method-assign]


def _lose_pieces(world: World, fault: Fault) -> Callable[[], None] | None:
    """For a while, every fourth piece of a worker's output never leaves it."""
    process = _process(world, fault)
    if not isinstance(process, SimWorker) or process.core is None:
        return None
    outbox = process.core._outbox
    whole, seen, over = outbox.add_frame, itertools.count(), False

    def lose(frame: work_pb2.WorkFrame, taken: Sequence[request_pb2.Output]) -> None:
        whole(frame, [output for output in taken if over or next(seen) % 4 != 3])

    outbox.add_frame = lose  # type: ignore[method-assign]

    def end() -> None:
        nonlocal over  # not taken out: another fault of this kind may have begun on top of it
        over = True

    return end


def _isolate_leader(world: World, fault: Fault) -> Callable[[], None] | None:
    """Whoever leads, from etcd and workers, sometimes from gateways too, for long enough to be followed by another."""
    for process in world.processes.values():
        if isinstance(process, SimScheduler) and process.process and process.process.seat.reign is not None:
            spared = "gateway" if world.rng.random() < 0.5 else process.name
            others = [name for name in world.names() if name != process.name and not name.startswith(spared)]
            for name in others:
                world.network.block(process.name, name)
                world.network.block(name, process.name)
            return lambda: _heal(world, process.name, others)
    return None


def _heal(world: World, name: str, others: list[str]) -> None:
    for other in others:
        world.network.unblock(name, other)
        world.network.unblock(other, name)


def _reset(world: World, fault: Fault) -> None:
    world.network.reset(fault.target, fault.other)


def _stall(world: World, fault: Fault) -> None:
    world.network.stall(fault.target, fault.other, fault.lasts_s)


def _damage(world: World, fault: Fault) -> None:
    world.network.damage(fault.target, fault.other)


def _slow_link(world: World, fault: Fault) -> Callable[[], None]:
    pair = (fault.target, fault.other)
    world.network.slow[pair] = 0.4

    def end() -> None:
        world.network.slow.pop(pair, None)

    return end


def _etcd_member(world: World, fault: Fault) -> Callable[[], None]:
    node = world.member(fault.target)
    world.loop.freeze(node)
    return lambda: world.loop.thaw(node)


def _etcd_gone(world: World, fault: Fault) -> Callable[[], None]:
    nodes: list[Node] = world.etcd.members
    for node in nodes:
        world.loop.freeze(node)

    def end() -> None:
        for node in nodes:
            world.loop.thaw(node)

    return end


def _etcd_leader(world: World, fault: Fault) -> None:
    world.etcd.lose_leader(fault.lasts_s)


def _etcd_compact(world: World, fault: Fault) -> None:
    """While a member's watches are behind or broken, so that they must notice."""
    world.etcd.store.compact()
    for name in world.names():
        world.network.reset(name, fault.target)


def _etcd_lag(world: World, fault: Fault) -> Callable[[], None]:
    world.etcd.lag_s[fault.target] = min(fault.lasts_s, 1.5)

    def end() -> None:
        world.etcd.lag_s[fault.target] = 0.0

    return end


def _etcd_lie(world: World, fault: Fault) -> Callable[[], None]:
    """A lease is gone, and its renewals are reported as granted."""
    world.etcd.lying = True
    _etcd_revoke(world, fault)

    def end() -> None:
        world.etcd.lying = False

    return end


def _etcd_revoke(world: World, fault: Fault) -> None:
    """A lease of somebody who lives runs out."""
    leases = sorted(one for one, lease in world.etcd.store.leases.items() if lease.keys)
    if leases:
        world.etcd.store.revoke(leases[world.rng.randrange(len(leases))])


def _etcd_unheard(world: World, fault: Fault) -> None:
    world.etcd.unheard += 2


def _etcd_slow(world: World, fault: Fault) -> Callable[[], None]:
    world.etcd.slow_s = 0.8

    def end() -> None:
        world.etcd.slow_s = 0.0

    return end


KINDS: dict[str, tuple[int, str, Apply]] = {
    "kill worker": (10, "worker", _kill),
    "freeze worker": (8, "worker", _freeze),
    "stop worker": (5, "worker", _terminate),
    "crash engine": (6, "worker", _crash_engine),
    "slow engine": (5, "worker", _slow_engine),
    "hang engine": (5, "worker", _hang_engine),
    "lose piece": (6, "worker", _lose_piece),
    "lose pieces": (5, "worker", _lose_pieces),
    "kill request": (6, "member", _kill_request),
    "kill scheduler": (9, "scheduler", _kill),
    "freeze scheduler": (9, "scheduler", _freeze),
    "stop scheduler": (4, "scheduler", _terminate),
    "kill gateway": (6, "gateway", _kill),
    "freeze gateway": (4, "gateway", _freeze),
    "stop gateway": (2, "gateway", _terminate),
    "partition": (8, "pair", _partition),
    "cut": (5, "pair", _cut),
    "isolate": (4, "any", _isolate),
    "isolate leader": (8, "member", _isolate_leader),
    "reset": (10, "pair", _reset),
    "stall": (8, "pair", _stall),
    "damage": (4, "pair", _damage),
    "slow link": (5, "pair", _slow_link),
    "freeze etcd member": (3, "member", _etcd_member),
    "etcd gone": (4, "member", _etcd_gone),
    "etcd without leader": (4, "member", _etcd_leader),
    "compaction": (5, "member", _etcd_compact),
    "etcd lags": (3, "member", _etcd_lag),
    "etcd lies": (4, "member", _etcd_lie),
    "lease lost": (5, "member", _etcd_revoke),
    "write unheard": (4, "member", _etcd_unheard),
    "etcd slow": (3, "member", _etcd_slow),
}
"""How often, what it is done to, and how."""


FAMILIES: dict[str, tuple[str, ...]] = {
    "kill": ("kill worker", "stop worker", "crash engine"),
    "freeze": ("freeze worker", "hang engine"),
    "stall": ("stall", "lose piece", "lose pieces"),
    "slow": ("slow engine", "slow link"),
    "partition": ("partition", "cut", "isolate", "reset"),
    "scheduler": ("kill scheduler", "freeze scheduler", "stop scheduler", "isolate leader"),
    "gateway": ("kill gateway", "freeze gateway", "stop gateway"),
    "etcd": (*(kind for kind in KINDS if "etcd" in kind), "compaction", "lease lost", "write unheard"),
    "other": ("kill request", "damage"),
}
"""Kinds under the names by which they are counted."""
_SHORTER = 0.4
"""Faults of a dense plan last so much shorter: with everything broken at once nothing would happen."""


def families(faults: Iterable[Fault]) -> dict[str, int]:
    """How many faults there are of each family."""
    counts = Counter(fault.kind for fault in faults)
    return {family: sum(counts[kind] for kind in kinds) for family, kinds in FAMILIES.items()}


def draw(rng: random.Random, span_s: float, names: dict[str, list[str]], *, dense: bool = False) -> list[Fault]:
    """A schedule by chance. `names`: nodes by role."""
    kinds = list(KINDS)
    weights = [KINDS[kind][0] for kind in kinds]
    faults = []
    for _ in range(rng.choice((24, 32, 40) if dense else (1, 3, 5, 7, 9))):
        kind = rng.choices(kinds, weights)[0]
        target, other = _where(rng, KINDS[kind][1], names)
        begin = rng.uniform(0.5, span_s)
        if kind == "isolate leader":
            begin *= 0.4
        lasts = 5.0 if kind == "isolate leader" else rng.choice((0.1, 0.5, 1.0, 2.0, 3.0, 5.0)) * rng.uniform(0.5, 1.5)
        lasts *= _SHORTER if dense else 1.0
        faults.append(Fault(kind, round(begin, 3), round(min(lasts, span_s + 2.0 - begin), 3), target, other))
    return sorted(faults, key=lambda fault: fault.at_s)


def _where(rng: random.Random, role: str, names: dict[str, list[str]]) -> tuple[str, str]:
    if role == "pair":
        pairs = [("scheduler", "worker"), ("gateway", "scheduler"), ("scheduler", "member"), ("worker", "member")]
        one, other = rng.choices([*pairs, ("scheduler", "scheduler")], weights=(5, 5, 2, 1, 3))[0]
        ends = [rng.choice(names[one]), rng.choice(names[other])]
        if one == other:
            ends = rng.sample(names[one], 2)
        rng.shuffle(ends)
        return ends[0], ends[1]
    if role == "any":
        return rng.choice([name for group in ("scheduler", "worker", "gateway") for name in names[group]]), ""
    return rng.choice(names[role]), ""


def begin(world: World, fault: Fault) -> None:
    """Let it happen, and end when its time is over."""
    world.trace.say(f"FAULT {fault.kind} {fault.target} {fault.other} for {fault.lasts_s} s")
    world.checks.disturbed(fault.lasts_s)
    end = KINDS[fault.kind][2](world, fault)
    if end is not None:
        world.loop.call_later(fault.lasts_s, _over, world, fault, end, context=NOWHERE)


def _over(world: World, fault: Fault, end: Callable[[], None]) -> None:
    world.trace.say(f"end of {fault.kind} {fault.target} {fault.other}")
    end()
