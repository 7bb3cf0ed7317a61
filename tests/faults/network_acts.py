"""Events of the network: what fault proxies do. A place is a service that is picked, or how proxies' names begin."""

from __future__ import annotations

import asyncio
import time
from typing import Literal

from tests.faults.acts import Pick
from tests.faults.proxy import FaultProxy, Way
from tests.faults.scenario import Act
from tests.faults.world import World


async def _proxies(world: World, place: str | Pick) -> list[FaultProxy]:
    """Before a service that is picked; or those whose names begin so, such as `etcd-` for all before etcd."""
    if isinstance(place, str):
        return [proxy for name, proxy in world.fleet.proxies.items() if name.startswith(place)]
    return [world.fleet.proxies[(await place(world)).name]]


def stall(place: str | Pick, *ways: Way) -> Act:
    """Nothing passes any more; connections stay open."""

    async def act(world: World) -> None:
        proxies = await _proxies(world, place)
        world.injected_now()
        for proxy in proxies:
            proxy.stall(*ways)

    return act


def reset(place: str | Pick) -> Act:
    """RST on every connection."""

    async def act(world: World) -> None:
        proxies = await _proxies(world, place)
        world.injected_now()
        for proxy in proxies:
            proxy.reset()

    return act


def flip(place: str | Pick, reads: int, way: Way = "down") -> Act:
    """Flip a bit in each of the next reads."""

    async def act(world: World) -> None:
        proxies = await _proxies(world, place)
        world.injected_now()
        for proxy in proxies:
            proxy.ways[way].flips = reads

    return act


def bit_storm(places: tuple[str, ...], seconds: float, every_s: float) -> Act:
    """Every now and then a bit flips on one of the ways through the named proxies, both directions."""

    async def act(world: World) -> None:
        ways = [(proxy, way) for place in places for proxy in await _proxies(world, place) for way in proxy.ways]
        before = sum(proxy.flipped for proxy in world.fleet.proxies.values())
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            proxy, way = world.rng.choice(ways)
            proxy.ways[way].flips = 1
            world.injected_now()
            await asyncio.sleep(every_s)
        world.facts["bits_flipped"] = sum(proxy.flipped for proxy in world.fleet.proxies.values()) - before

    return act


def cut(pick: Pick, way: Literal["in", "out"]) -> Act:
    """The router drops all that goes to a service (`in`), or all that comes from it (`out`)."""

    async def act(world: World) -> None:
        assert world.fleet.apart is not None
        service = await pick(world)
        world.injected_now()
        await asyncio.to_thread(world.fleet.apart.cut, service.name, way)

    return act


def mend() -> Act:
    """The router knows all ways again."""

    async def act(world: World) -> None:
        assert world.fleet.apart is not None
        await asyncio.to_thread(world.fleet.apart.mend)

    return act


def roughen(place: str | Pick, *, delay_s: float = 0.0, slice_bytes: int = 0) -> Act:
    """Delay and slice, both directions."""

    async def act(world: World) -> None:
        proxies = await _proxies(world, place)
        world.injected_now()
        for mischief in (mischief for proxy in proxies for mischief in proxy.ways.values()):
            mischief.delay_s, mischief.slice_bytes = delay_s, slice_bytes

    return act


def heal(place: str | Pick) -> Act:
    """The proxy passes everything again."""

    async def act(world: World) -> None:
        for proxy in await _proxies(world, place):
            proxy.heal()

    return act
