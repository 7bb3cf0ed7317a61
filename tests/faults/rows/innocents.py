"""Who harms others: requests that kill engines, workers that run out of memory; and gateways out of descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time

from llmos.lifetime import EXIT_RESTART
from tests.faults.acts import order, pause, restart, until_answered, worker
from tests.faults.checks import all_alive, exactly, mates_are_served
from tests.faults.doubles.engine import POISON
from tests.faults.kernel_acts import limit_memory
from tests.faults.rows.workers import ENGINE_ENDED
from tests.faults.scenario import Act, Event, Load, Scenario, Shape
from tests.faults.world import World

_QUARANTINED = "request_quarantined"
_MOST_LOST = 2
_AFRESH = r"to be started afresh: ([\d,]+) of ([\d,]+) bytes of memory"
_LIMIT = 256 << 20
BOUNDED = Shape(worker_flags=("--memory-limit", str(_LIMIT)))


def crowd(count: int) -> Act:
    """So many connections that ask for nothing, to each gateway, for three seconds."""

    async def act(world: World) -> None:
        world.injected_now()
        writers = []
        for url in world.fleet.urls:
            for _ in range(count):
                with contextlib.suppress(OSError, TimeoutError):
                    async with asyncio.timeout(1.0):
                        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
                    writers.append(writer)
        await asyncio.sleep(3.0)
        world.facts["connections"] = len(writers)
        for writer in writers:
            writer.close()
        world.fault_at = time.monotonic()

    return act


def poison() -> Act:
    """A request whose prompt ends every engine that computes it; said again, it must be refused at once."""

    async def act(world: World) -> None:
        world.injected_now()
        for service in world.fleet.of("worker"):
            service.order("abort")
            service.marked = True
        # Of this scenario alone: what another one asked may still be refused.
        asked = f"a {POISON} prompt in '{world.scenario.name}' {world.seed}"
        answers = [await world.clients.say(asked) for _ in range(2)]
        if answers != [_QUARANTINED] * 2:
            world.problems.append(f"the poisonous request got {answers}")
        lost = [one.name for one in world.fleet.of("worker") if one.first_line(ENGINE_ENDED, world.fault_unix_s)]
        world.facts["engines_lost"] = len(lost)
        if len(lost) > _MOST_LOST:
            world.problems.append(f"engines lost: {', '.join(lost)}")

    return act


def starts_afresh(limit: int) -> Act:
    """A leaking worker ends by itself, before its limit, and is replaced."""

    async def act(world: World) -> None:
        service = await worker()(world)
        status = await asyncio.to_thread(service.wait_end, 60.0)
        hit = service.first_line(_AFRESH, world.fault_unix_s)
        said = re.search(_AFRESH, hit[1]) if hit else None
        if status != EXIT_RESTART or said is None:
            world.problems.append(f"{service.name} ended with {status}, and said {hit}")
            return
        used, allowed = (int(number.replace(",", "")) for number in said.groups())
        world.facts["used_mib"], world.facts["limit_mib"] = used >> 20, allowed >> 20
        if allowed != limit or used >= allowed:
            world.problems.append(f"it left at {used} of {allowed} bytes, the limit being {limit}")
        world.times["afresh_s"] = time.monotonic() - world.fault_at
        await restart(worker())(world)

    return act


SCENARIOS = (
    Scenario(
        "query of death",
        "query of death",
        (Event("a prompt that ends engines, among streams", poison(), tokens=20),),
        load=Load(streams=16, tokens=250),
        targets={"gap_s": 2.5},
        echo=True,
        note="the streams that ran beside it are innocent, all of them end whole",
    ),
    Scenario(
        "poison inside a batch of 8",
        "poison inside a batch",
        (Event("a prompt that ends engines, among eight streams on each", poison(), tokens=20),),
        load=Load(streams=24, tokens=250, askers=0, patience_s=60),
        checks=(
            ("one request is to blame", exactly("quarantined", 1)),
            ("its mates are served", mates_are_served()),
        ),
        targets={"gap_s": 2.5},
        echo=True,
    ),
    Scenario(
        "memory leak",
        "memory leak",
        (
            Event("a worker's engine takes more with every step", order(worker(), "leak"), tokens=20),
            Event("it is emptied, ends and is started afresh before its limit", starts_afresh(_LIMIT)),
        ),
        BOUNDED,
        Load(tokens=900, patience_s=90),
        note="the worker leaves on its own account; the supervisor's part, a new process, is played by the harness",
    ),
    Scenario(
        "file descriptors run out",
        "file descriptors run out",
        (
            Event("200 connections to gateways that may open 128 files", crowd(200), tokens=20),
            Event("a new request is answered", until_answered()),
        ),
        Shape(open_files=128),
        Load(tokens=200),
        checks=(("every service lives", all_alive()),),
        errors=frozenset({"ReadError", "ConnectError", "ReadTimeout", "overloaded", "too_many_requests", "503"}),
        targets={"gap_s": 1.0},
        note="who comes while there is none is refused; the streams that run go on",
    ),
    Scenario(
        "out of memory",
        "out of memory",
        (
            Event("a worker may take 64 MiB more", limit_memory(worker(), 64 << 20), tokens=20),
            Event("its engine takes more and more", order(worker(), "hog")),
            Event("the kernel ends it", pause(4.0)),
        ),
        load=Load(tokens=260),
        targets={"gap_s": 2.5},
    ),
)
