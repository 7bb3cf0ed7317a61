"""Events that need root: bounds on memory and processor time, a full disk; and those of etcd's members."""

from __future__ import annotations

import asyncio
import json
import time

from tests.fakes.etcd_server import EtcdServer
from tests.faults.acts import Pick
from tests.faults.fleet import until
from tests.faults.kernel import ControlGroup
from tests.faults.scenario import Act
from tests.faults.world import World


def limit_memory(pick: Pick, extra: int) -> Act:
    """A worker and its engine may take `extra` bytes more, in a control group of their own."""

    async def act(world: World) -> None:
        service = await pick(world)
        group = ControlGroup(world.fleet.ledger, "memory")
        group.limit_memory(extra)
        for process in service.family():
            group.take(process.pid)
        service.marked = True

    return act


def limit_cpu(pick: Pick, share: float) -> Act:
    """A worker and its engine get this much of one processor."""

    async def act(world: World) -> None:
        service = await pick(world)
        group = world.groups[service.name] = ControlGroup(world.fleet.ledger, "cpu")
        group.limit_cpu(share)
        world.injected_now()
        for process in service.family():
            group.take(process.pid)

    return act


def unlimit_cpu(pick: Pick) -> Act:
    """All of them again."""

    async def act(world: World) -> None:
        world.groups.pop((await pick(world)).name).release()

    return act


def fill_disk() -> Act:
    """Nothing more can be written where etcd's data and all logs are."""

    async def act(world: World) -> None:
        assert world.fleet.disk is not None
        world.injected_now()
        world.facts["filled_mib"] = world.fleet.disk.fill() >> 20

    return act


def clear_disk() -> Act:
    """There is room again; an etcd that ended of it is started."""

    async def act(world: World) -> None:
        assert world.fleet.disk is not None
        world.fleet.disk.clear()
        await revive_etcd()(world)

    return act


def stop_etcd() -> Act:
    """SIGKILL to every member."""

    async def act(world: World) -> None:
        world.injected_now()
        for member in world.fleet.etcd:
            await asyncio.to_thread(member.stop)

    return act


def revive_etcd(measure: str = "") -> Act:
    """Start the members that do not run; measure how long the leader then takes to see all again."""

    async def act(world: World) -> None:
        await world.fleet.revive_etcd()
        begun = time.monotonic()
        if measure:
            await world.fleet.wait_whole(30.0)
            world.times[measure] = time.monotonic() - begun

    return act


def kill_etcd_leader() -> Act:
    """SIGKILL to the member that leads etcd."""

    async def act(world: World) -> None:
        member: EtcdServer = await asyncio.to_thread(_etcd_leader, world.fleet.etcd)
        world.injected_now()
        await asyncio.to_thread(member.stop)

    return act


def _etcd_leader(members: list[EtcdServer]) -> EtcdServer:
    for member in members:
        status = json.loads(member.ctl("endpoint", "status", "--write-out=json"))[0]["Status"]
        if status["leader"] == status["header"]["member_id"]:
            return member
    raise RuntimeError("no member leads")


def compact_etcd() -> Act:
    """Forget all history."""

    async def act(world: World) -> None:
        world.injected_now()
        await asyncio.to_thread(world.fleet.etcd[0].compact)

    return act


def until_written(measure: str) -> Act:
    """Until etcd takes a write again: control works."""

    async def act(world: World) -> None:
        begun = time.monotonic()

        async def written() -> bool:
            for member in world.fleet.etcd:
                try:
                    await asyncio.to_thread(member.ctl, "--command-timeout=1s", "put", "/llmos-faults/probe", "1")
                except RuntimeError:
                    continue
                return True
            return False

        await until(written, "etcd to take a write")
        world.times[measure] = time.monotonic() - begun

    return act


def jump_clocks(seconds: int) -> Act:
    """The wall clock of every service is wrong by so much from now on; every second one's in the other direction."""

    async def act(world: World) -> None:
        world.injected_now()
        for number, service in enumerate(world.fleet.services):
            (service.orders / "jump").write_text(str(seconds if number % 2 else -seconds))

    return act
