"""One scenario while it runs: the fleet, the clients, what was chosen, what was measured."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx

from llmos.cli.span_picture import picture
from llmos.cli.trace import span_row
from llmos.v1 import fleet_pb2
from tests.faults.clients import Clients
from tests.faults.fleet import Fleet, until
from tests.faults.kernel import ControlGroup
from tests.faults.scenario import Event, Result, Scenario
from tests.faults.services import Service
from tests.faults.verdict import Counts, quantile

_SAMPLE_S = 0.25
_RESERVE, _RESERVE_S, _SHARE = 3, 10.0, 0.1
"""Retries and hedges: a tenth of the accepted requests, and three in ten seconds."""
_TOLD = ("migrations", "retries", "hedges", "stale_outputs", "fenced", "damaged_streams")
_BUDGETED = ("retries", "hedges")


@dataclass(slots=True)
class World:
    """What events act on and checks look at."""

    scenario: Scenario
    seed: int
    fleet: Fleet
    clients: Clients
    rng: random.Random
    chosen: dict[str, Service] = field(default_factory=dict)
    """Services by the part that they play, such as `victim`."""
    times: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    fault_at: float = 0.0
    """Monotonic seconds of the first injection; 0 before."""
    fault_unix_s: float = 0.0
    last_fault_unix_s: float = 0.0
    injected: int = 0
    problems: list[str] = field(default_factory=list)
    counters: dict[int, Counter[str]] = field(default_factory=dict)
    """The core's counters by term, as last seen, less what they were before."""
    before: dict[int, Counter[str]] = field(default_factory=dict)
    loads: list[tuple[float, fleet_pb2.GetLoadResponse]] = field(default_factory=list)
    moved: list[fleet_pb2.Span] = field(default_factory=list)
    """Spans of one request that moved, where a check looked for them."""
    groups: dict[str, ControlGroup] = field(default_factory=dict)
    """Control groups by service."""
    begun_at: float = field(default_factory=time.monotonic)
    begun_unix_s: float = field(default_factory=time.time)

    def choose(self, part: str, role: str) -> Service:
        """The same service for the same part throughout; which one, the seed says."""
        if part not in self.chosen:
            free = [one for one in self.fleet.of(role) if one not in self.chosen.values()]
            self.chosen[part] = self.rng.choice(free)
        return self.chosen[part]

    def injected_now(self) -> None:
        """A fault is injected now: counted, and what times are measured from."""
        self.injected += 1
        self.last_fault_unix_s = time.time()
        if not self.fault_at:
            self.fault_at, self.fault_unix_s = time.monotonic(), self.last_fault_unix_s

    def total(self, counter: str) -> int:
        """Of all reigns during the scenario."""
        return sum(
            counts[counter] - self.before.get(term, Counter())[counter] for term, counts in self.counters.items()
        )

    async def logged(self, pattern: str, timeout_s: float = 30.0) -> float:
        """Seconds from the last fault until some log shows the pattern; waits for it."""
        since = self.last_fault_unix_s

        def found() -> float:
            hits = [hit[0] for one in self.fleet.services if (hit := one.first_line(pattern, since)) is not None]
            return max(min(hits) - since, 1e-3) if hits else 0.0

        return float(await until(found, f"a log to say {pattern!r}", timeout_s))

    async def released(self, timeout_s: float = 10.0) -> None:
        """Until no request waits or runs, and every KV block is free. Raises TimeoutError."""

        async def free() -> bool:
            load = await self.fleet.load()
            if load is None or any(queue.waiting or queue.running for queue in load.queues):
                return False
            models = [model for node in load.nodes for model in node.models if model.total_blocks]
            return all(model.free_blocks == model.total_blocks for model in models)

        await until(free, "every request and every KV block to be released", timeout_s)

    async def sample(self) -> None:
        """Look at the leader's counters and its load until cancelled."""
        while True:
            load = await self.fleet.load()
            if load is not None:
                self.counters[load.term] = Counter(dict(load.counters))
                self.loads.append((time.monotonic(), load))
            await asyncio.sleep(_SAMPLE_S)


async def play(scenario: Scenario, seed: int, fleet: Fleet) -> Result:
    """Run one scenario on a healthy fleet."""
    limits = httpx.Limits(max_connections=scenario.load.streams + scenario.load.askers + 8)
    async with httpx.AsyncClient(
        timeout=scenario.load.patience_s, limits=limits, trust_env=False, verify=fleet.trust
    ) as http:
        clients = Clients(fleet.urls, scenario.load, seed, http)
        if scenario.load.unknown:
            known = fleet.undisturbed
            if (scenario.load, seed) not in known:
                known[scenario.load, seed] = await _undisturbed(scenario, seed, fleet, http)
            clients.expect(known[scenario.load, seed])
        world = World(scenario, seed, fleet, clients, random.Random(f"{scenario.name} {seed}"))
        load = await fleet.load()
        if load is not None:
            world.before[load.term] = world.counters[load.term] = Counter(dict(load.counters))
        await _run(world)
        for name, check in scenario.checks:
            with contextlib.suppress(asyncio.CancelledError):
                complaint = await _checked(world, check)
                if complaint:
                    world.problems.append(f"{name}: {complaint}")
        return await _judge(world)


async def _undisturbed(scenario: Scenario, seed: int, fleet: Fleet, http: httpx.AsyncClient) -> list[dict[int, str]]:
    """What the same streams say when nothing happens."""
    clients = Clients(fleet.urls, scenario.load, seed, http)
    async with asyncio.TaskGroup() as group:
        for stream in clients.streams:
            group.create_task(clients.follow(stream))
    broken = [stream.error or stream.broken for stream in clients.streams if stream.error or stream.broken]
    if broken:
        raise RuntimeError(f"the undisturbed run failed: {broken[0]}")
    return [stream.texts for stream in clients.streams]


async def _checked(world: World, check: object) -> str:
    try:
        return str(await check(world) or "")  # type: ignore[operator]
    except (TimeoutError, RuntimeError, OSError) as error:
        return str(error)


async def _run(world: World) -> None:
    """The events beside the clients."""
    async with asyncio.TaskGroup() as group:
        for stream in world.clients.streams:
            group.create_task(world.clients.follow(stream))
        for number in range(world.scenario.load.askers):
            group.create_task(world.clients.ask(number))
        sampler = group.create_task(world.sample())
        try:
            for event in world.scenario.events:
                await _due(world, event)
                await event.act(world)
        except (TimeoutError, RuntimeError, OSError) as error:
            world.problems.append(str(error))
        await until(
            lambda: all(stream.over for stream in world.clients.streams),
            "streams to end",
            world.scenario.load.patience_s * 2,
        )
        world.clients.enough.set()
        if (first_s := world.clients.asked.first_after(world.fault_at)) >= 0:
            world.times.setdefault("new_answer_s", first_s)
        sampler.cancel()


async def _due(world: World, event: Event) -> None:
    if event.tokens:
        await until(lambda: world.clients.reached >= event.tokens, f"{event.tokens} tokens before '{event.what}'", 60.0)
    if event.after_s:
        await asyncio.sleep(event.after_s)


async def _judge(world: World) -> Result:
    scenario, clients = world.scenario, world.clients
    try:
        await world.released()
    except TimeoutError as error:
        world.problems.append(str(error))
    counts = Counts(injected=world.injected)
    for stream in clients.streams:
        counts.add(stream.counts())
    counts.add(clients.asked.counts)
    if scenario.notice:
        try:
            world.times.setdefault("detection_s", await _noticed(world))
        except TimeoutError as error:
            world.problems.append(str(error))
    period_s, gaps = 1 / world.fleet.shape.speed, list[float]()
    pauses = [stream.longest_pause_s(world.fault_at) for stream in clients.streams if stream.times_s]
    if pauses and world.fault_at:
        gaps = [round(max(0.0, pause - period_s), 3) for pause in pauses]
        world.times.setdefault("gap_s", quantile(gaps, 0.99))
    world.problems += _unwanted(world)
    world.problems += _over_budget(world)
    facts = {name: float(world.total(name)) for name in _TOLD}
    facts |= world.facts | {
        "answers": float(clients.asked.answers),
        "returns": float(sum(s.returns for s in clients.streams)),
    }
    return Result(
        scenario.name,
        scenario.row,
        world.seed,
        counts,
        {name: round(value, 3) for name, value in world.times.items()},
        scenario.targets,
        world.problems,
        {name: value for name, value in facts.items() if value},
        round(time.monotonic() - world.begun_at, 2),
        scenario.note,
        gaps,
        picture([span_row(span) for span in world.moved], f"{scenario.name}: one request") if world.moved else "",
    )


async def _noticed(world: World) -> float:
    world.last_fault_unix_s = world.fault_unix_s
    return await world.logged(world.scenario.notice, 10.0)


def _unwanted(world: World) -> list[str]:
    """Errors that clients saw and ought not to have seen."""
    seen = Counter(stream.error for stream in world.clients.streams if stream.error)
    seen.update(world.clients.asked.errors)
    seen.update(stream.broken for stream in world.clients.streams if stream.broken)
    return [f"clients saw {code} x {count}" for code, count in seen.items() if code not in world.scenario.errors]


def _over_budget(world: World) -> list[str]:
    accepted = world.clients.asked.answers + len(world.clients.streams)
    lasted_s = time.monotonic() - world.begun_at
    allowed = _SHARE * accepted + _RESERVE * (1 + lasted_s // _RESERVE_S)
    spent = sum(world.total(name) for name in _BUDGETED)
    return [f"{spent} retries and hedges of {accepted} requests in {lasted_s:.0f} s"] if spent > allowed else []
