"""Random faults by seed: singles, pairs, triples, at random tokens, on random services, on either backend."""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.faults.acts import Pick, freeze, kill, kill_engine, leader, order, pause, recall, some, thaw, worker
from tests.faults.kernel_acts import limit_cpu, unlimit_cpu
from tests.faults.network_acts import flip, heal, reset, roughen, stall
from tests.faults.scenario import MIX, Act, Event, Load, Scenario, Shape

SHAPE = Shape(workers=4, proxied=True)
TORCH = Shape(workers=3, proxied=True, torch=True)
_LOAD = Load(streams=10, tokens=200, kinds=("greedy", "seeded", "four", "penalties"), patience_s=60)
_REAL = Load(streams=10, tokens=200, kinds=MIX, patience_s=60, model="tiny", unknown=True)
_PLAIN = ("it lasts", "it is over")
Faults = list[tuple[str, Act]]


def _lasting(what: str, begin: Act, end: Act, rng: random.Random) -> Faults:
    return [(what, begin), ("it lasts", pause(rng.uniform(0.2, 4.0))), ("it is over", end)]


def _frozen(pick: Pick, rng: random.Random, *, engine_only: bool = False) -> Faults:
    what = "an engine freezes" if engine_only else "a service freezes"
    return _lasting(what, freeze(pick, engine_only=engine_only), thaw(pick, stale=False), rng)


_WORKERS: tuple[Callable[[Pick, random.Random], Faults], ...] = (
    lambda pick, rng: [("a worker is killed", kill(pick))],
    lambda pick, rng: [("an engine is killed", kill_engine(pick))],
    _frozen,
    lambda pick, rng: _frozen(pick, rng, engine_only=True),
    lambda pick, rng: _lasting("a worker's answers stall", stall(pick, "down"), heal(pick), rng),
    lambda pick, rng: _lasting("what a worker is told stalls", stall(pick, "up"), heal(pick), rng),
    lambda pick, rng: _lasting("a worker is cut off", stall(pick), heal(pick), rng),
    lambda pick, rng: [("a worker's connections are reset", reset(pick))],
    lambda pick, rng: _lasting("half of its streams stand still", order(pick, "mute"), recall(pick, "mute"), rng),
    lambda pick, rng: _lasting("a worker gets little of a processor", limit_cpu(pick, 0.02), unlimit_cpu(pick), rng),
    lambda pick, rng: _lasting("bits flip in what it says", flip(pick, 3, "down"), heal(pick), rng),
    lambda pick, rng: _lasting("bits flip in what it is told", flip(pick, 3, "up"), heal(pick), rng),
    lambda pick, rng: _lasting(
        "a worker's network is rough", roughen(pick, delay_s=0.1, slice_bytes=11), heal(pick), rng
    ),
)
_OTHERS: tuple[Callable[[random.Random], Faults], ...] = (
    lambda rng: [("the leader is killed", kill(leader()))],
    lambda rng: _frozen(leader(), rng),
    lambda rng: [("a gateway is killed", kill(some("gateway", "gateway")))],
    lambda rng: _lasting("etcd is cut off from all", stall("etcd-"), heal("etcd-"), rng),
)


def scenario(seed: int, count: int, *, torch: bool) -> Scenario:
    """`count` faults, at most one not of workers: etcd and the leader lost together are outside the promise."""
    rng = random.Random(f"random {count} {seed}")
    others = rng.sample(_OTHERS, 1) if rng.random() < 0.4 else []
    faults = [make(rng) for make in others]
    faults += [rng.choice(_WORKERS)(worker(f"victim {n}"), rng) for n in range(count - len(faults))]
    rng.shuffle(faults)
    events = tuple(
        Event(what, act, tokens=10 + rng.randrange(60 * (n + 1)) if not step else 0)
        for n, fault in enumerate(faults)
        for step, (what, act) in enumerate(fault)
    )
    kind = ("single fault", "pair", "triple")[count - 1]
    name = f"random {kind} {seed}"
    shape, load, name = (TORCH, _REAL, f"{name} (torch)") if torch else (SHAPE, _LOAD, name)
    told = frozenset({"ReadError", "ConnectError", "RemoteProtocolError"}) if _kills_gateway(faults) else frozenset()
    note = ", ".join(what for fault in faults for what, _ in fault if what not in _PLAIN)
    return Scenario(name, f"random {kind}s", events, shape, load, errors=told, note=note)


def _kills_gateway(faults: list[Faults]) -> bool:
    return any(what == "a gateway is killed" for fault in faults for what, _ in fault)
