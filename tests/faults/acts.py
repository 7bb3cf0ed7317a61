"""What events do. Each returns an act for `Event`; parts name services that the seed has chosen."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import psutil

from tests.faults.fleet import until
from tests.faults.scenario import Act
from tests.faults.services import Service
from tests.faults.world import World

Pick = Callable[[World], Awaitable[Service]]


def worker(part: str = "victim") -> Pick:
    """Some worker that runs streams, the same one for the same part."""

    async def pick(world: World) -> Service:
        if part not in world.chosen:
            running = Counter(row.worker for row in await world.fleet.requests())
            free = [one for one in world.fleet.of("worker") if one not in world.chosen.values()]
            most = max((running[one.id] for one in free), default=0)
            # One with a short request only would show nothing.
            world.chosen[part] = world.rng.choice([one for one in free if 2 * running[one.id] >= most])
        return world.chosen[part]

    return pick


def leader(part: str = "leader") -> Pick:
    """The scheduler that leads when it is first asked for."""

    async def pick(world: World) -> Service:
        if part not in world.chosen:
            world.chosen[part] = await world.fleet.leader()
        return world.chosen[part]

    return pick


def some(role: str, part: str = "victim") -> Pick:
    """Any service of a role."""

    async def pick(world: World) -> Service:
        return world.choose(part, role)

    return pick


def kill(pick: Pick) -> Act:
    """SIGKILL."""

    async def act(world: World) -> None:
        service = await pick(world)
        world.injected_now()
        await asyncio.to_thread(service.kill)

    return act


def kill_engine(pick: Pick) -> Act:
    """SIGKILL to a worker's engine process; the worker lives."""

    async def act(world: World) -> None:
        service = await pick(world)
        world.injected_now()
        service.signal(signal.SIGKILL, itself=False)

    return act


def freeze(pick: Pick, *, engine_only: bool = False) -> Act:
    """SIGSTOP to the service and its children, or to the engine alone."""

    async def act(world: World) -> None:
        service = await pick(world)
        world.injected_now()
        service.signal(signal.SIGSTOP, itself=not engine_only)

    return act


def thaw(pick: Pick, *, stale: bool = True) -> Act:
    """SIGCONT. With `stale`, whatever a worker computed before makes itself known from now on."""

    async def act(world: World) -> None:
        service = await pick(world)
        if stale and service.role == "worker":
            service.order("stale")
        service.signal(signal.SIGCONT)

    return act


def order(pick: Pick, name: str) -> Act:
    """An order to a worker's engine (see `doubles/engine.py`); its process is replaced afterwards."""

    async def act(world: World) -> None:
        service = await pick(world)
        world.injected_now()
        service.order(name)
        service.marked = True

    return act


def recall(pick: Pick, name: str) -> Act:
    """Take an order back."""

    async def act(world: World) -> None:
        (await pick(world)).recall(name)

    return act


def term(pick: Pick, measure: str = "") -> Act:
    """SIGTERM, wait for the end, which must be a good one."""

    async def act(world: World) -> None:
        service = await pick(world)
        begun = time.monotonic()
        status = await asyncio.to_thread(service.stop)
        if measure:
            world.times[measure] = time.monotonic() - begun
        if status != 0:
            world.problems.append(f"{service.name} ended with {status} after SIGTERM")

    return act


def restart(pick: Pick) -> Act:
    """A new process in the place of one that has ended."""

    async def act(world: World) -> None:
        service = await pick(world)
        await asyncio.to_thread(service.end)
        service.spawn()
        await asyncio.to_thread(service.wait_ready)

    return act


def until_logged(pattern: str, measure: str = "", timeout_s: float = 30.0) -> Act:
    """Wait until some log says so."""

    async def act(world: World) -> None:
        took = await world.logged(pattern, timeout_s)
        if measure:
            world.times[measure] = took

    return act


def until_counted(counter: str, measure: str = "detection_s", timeout_s: float = 30.0) -> Act:
    """Wait until the leader has counted it."""

    async def act(world: World) -> None:
        term = max(world.counters, default=0)
        before = world.before.get(term, {}).get(counter, 0)

        async def counted() -> bool:
            load = await world.fleet.load()
            return load is not None and load.counters.get(counter, 0) > (before if load.term == term else 0)

        await until(counted, f"the leader to count {counter}", timeout_s)
        world.times.setdefault(measure, time.monotonic() - world.fault_at)

    return act


def until_moved(pick: Pick, timeout_s: float = 20.0) -> Act:
    """Wait until nothing of the clients runs on a worker any more, as the leader sees it."""

    async def act(world: World) -> None:
        service = await pick(world)

        async def moved() -> bool:
            rows = await world.fleet.requests()
            return bool(rows) and all(row.worker != service.id for row in rows)

        await until(moved, f"everything to leave {service.name}", timeout_s)

    return act


def until_answered(measure: str = "new_answer_s") -> Act:
    """Wait until a request that began after the fault is answered."""

    async def act(world: World) -> None:
        since = time.monotonic() if not world.fault_at else world.fault_at
        world.times[measure] = await until(
            lambda: max(0.0, world.clients.asked.first_after(since)), "an answer to a new request"
        )

    return act


def until_whole(measure: str = "", timeout_s: float = 30.0) -> Act:
    """Wait until the leader sees every worker ready."""

    async def act(world: World) -> None:
        begun = time.monotonic()
        await world.fleet.wait_whole(timeout_s)
        if measure:
            world.times[measure] = time.monotonic() - begun

    return act


def leave_all(measure: str) -> Act:
    """Every client resets its connection; how long until nothing of them is left."""

    async def act(world: World) -> None:
        world.injected_now()
        world.clients.leave.set()
        await until(lambda: all(stream.over for stream in world.clients.streams), "clients to leave", 5.0)
        begun = max((stream.left_at for stream in world.clients.streams), default=time.monotonic())
        await world.released()
        world.times[measure] = time.monotonic() - begun

    return act


def gone(pick: Pick, measure: str = "") -> Act:
    """Wait until the leader has forgotten a worker."""

    async def act(world: World) -> None:
        service, begun = await pick(world), time.monotonic()

        async def forgotten() -> bool:
            load = await world.fleet.load()
            return load is not None and all(node.id != service.id for node in load.nodes)

        await until(forgotten, f"{service.name} to be forgotten")
        if measure:
            world.times[measure] = time.monotonic() - begun

    return act


def pause(seconds: float) -> Act:
    """The fault lasts."""

    async def act(world: World) -> None:
        await asyncio.sleep(seconds)

    return act


def memory_of(pid: int) -> int:
    """Bytes of main memory that are a process's own."""
    return int(psutil.Process(pid).memory_full_info().uss)
