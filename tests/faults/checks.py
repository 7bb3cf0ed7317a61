"""What scenarios look at after the load has ended. Each says what is wrong, or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from itertools import pairwise

import grpc

from llmos.v1 import fleet_pb2
from tests.faults.scenario import Check
from tests.faults.world import World


def never(counter: str) -> Check:
    """A counter of the core that must not have moved."""

    async def check(world: World) -> str:
        count = world.total(counter)
        return f"{counter} {count}, not 0" if count else ""

    return check


def at_least(counter: str, least: int = 1) -> Check:
    """A counter of the core that must have moved: the fault was real."""

    async def check(world: World) -> str:
        count = world.total(counter)
        return f"{counter} {count}, not {least} at least" if count < least else ""

    return check


def exactly(counter: str, count: int) -> Check:
    """A counter of the core that must have moved by so much."""

    async def check(world: World) -> str:
        found = world.total(counter)
        return "" if found == count else f"{counter} {found}, not {count}"

    return check


def no_more_decisions(most: int) -> Check:
    """The scheduler retried, hedged, moved and put out no more while the fault lasted than between, but for `most`."""

    async def check(world: World) -> str:
        within, between = world.facts["decisions_within"], world.facts["decisions_between"]
        return f"{within:g} decisions while it lasted, {between:g} between" if within > between + most else ""

    return check


def mates_are_served() -> Check:
    """Prompts that ran beside the fault are taken and answered when they are asked again."""

    async def check(world: World) -> str:
        answers = [await world.clients.say(str(stream.body["prompt"])) for stream in world.clients.streams]
        refused = [answer for answer in answers if answer != "answered"]
        return f"{len(refused)} of {len(answers)} innocents refused: {refused[0]}" if refused else ""

    return check


def same_leader() -> Check:
    """Nobody else was elected."""

    async def check(world: World) -> str:
        terms = sorted(world.counters)
        return f"terms {terms}, not one" if len(terms) != 1 else ""

    return check


def logged(pattern: str, role: str) -> Check:
    """A log of a role shows it, since the first fault."""

    async def check(world: World) -> str:
        found = [one for one in world.fleet.of(role) if one.first_line(pattern, world.fault_unix_s)]
        return "" if found else f"no {role} logged {pattern!r}"

    return check


def not_logged(pattern: str) -> Check:
    """No log shows it since the scenario began."""

    async def check(world: World) -> str:
        hits = [hit[1] for one in world.fleet.services if (hit := one.first_line(pattern, world.begun_unix_s))]
        return f"logged: {hits[0][:200]}" if hits else ""

    return check


def all_alive() -> Check:
    """No process has ended."""

    async def check(world: World) -> str:
        dead = [one.name for one in world.fleet.services if not one.alive]
        return f"ended: {', '.join(dead)}" if dead else ""

    return check


def at_most(fact: str, most: float) -> Check:
    """Something that an event measured."""

    async def check(world: World) -> str:
        value = world.facts.get(fact, world.times.get(fact, -1.0))
        return "" if 0 <= value <= most else f"{fact} {value:g}, not {most:g} at most"

    return check


def moved_elsewhere() -> Check:
    """Every attempt that was given up has a successor on another worker, and says why it was given up."""

    async def check(world: World) -> str:
        moved = 0
        for stream in world.clients.streams:
            spans = await spans_of(world, stream.request_id)
            attempts = without_needless(attempts_among(spans))
            if len(attempts) > 1 and (not world.moved or "bound" in attempts[0].error):
                world.moved = spans
            for before, after in pairwise(attempts):
                moved += 1
                if before.attributes.get("llmos.worker") == after.attributes.get("llmos.worker"):
                    return f"{stream.request_id} was dispatched to {before.attributes.get('llmos.worker')} again"
                if not before.attributes.get("llmos.reason"):
                    return f"the trace of {stream.request_id} does not say why it moved"
        world.facts["moved"] = moved
        return "" if moved else "no trace shows a request that moved"

    return check


def without_needless(attempts: Sequence[fleet_pb2.Span]) -> list[fleet_pb2.Span]:
    """Less second attempts that the first one forestalled: nothing moved to them."""
    needless = {
        after.span_id for before, after in pairwise(attempts) if before.attributes.get("llmos.hedge", "") == "won"
    }
    return [one for one in attempts if one.span_id not in needless or one.attributes.get("llmos.hedge", "") != "lost"]


async def spans_of(world: World, request_id: str) -> list[fleet_pb2.Span]:
    """All of a request, from the leader's ring; none if it is not held."""
    for gateway in world.fleet.of("gateway"):
        with contextlib.suppress(grpc.aio.AioRpcError):
            asked = fleet_pb2.GetTraceRequest(id=request_id)
            return list((await world.fleet.stub(gateway).GetTrace(asked, timeout=5)).spans)
    return []


def attempts_among(spans: Sequence[fleet_pb2.Span]) -> list[fleet_pb2.Span]:
    """The attempts at a request, in order."""
    return sorted((span for span in spans if span.name == "attempt"), key=lambda span: span.start_unix_ns)
