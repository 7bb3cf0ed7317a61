"""Events of many clients at once: slow readers, bursts, everybody after a restart; and how long the others wait."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections import Counter
from itertools import pairwise

import httpx

from tests.faults.acts import memory_of
from tests.faults.fleet import until
from tests.faults.scenario import Act
from tests.faults.verdict import quantile
from tests.faults.world import World

DECISIONS = ("retries", "hedges", "migrations", "stalls", "hangs", "ejections")
_TIGHT = 2048
"""Bytes of a slow reader's receive buffer: what it does not read soon waits in the gateway."""
_NORMAL = 1.5
"""Times the usual wait."""


def answer_times_s(world: World, begin: float, end: float) -> list[float]:
    """How long the short requests took that lie between two monotonic times."""
    return [over - begun for begun, over in world.clients.asked.answered_at if begin <= begun and over <= end]


def gaps_s(world: World, begin: float, end: float) -> list[float]:
    """Between events of one stream, all of them together."""
    found = []
    for stream in world.clients.streams:
        found += [later - early for early, later in pairwise(stream.times_s) if begin <= early and later <= end]
    return found


def in_turns(name: str, begin: Act, end: Act, rounds: int, seconds: float) -> Act:
    """A fault that comes and goes: how much longer short requests take while it lasts, in percent of their median; and
    what the scheduler decided while it lasted, and between."""

    async def act(world: World) -> None:
        without: list[float] = []
        within: list[float] = []
        decided = {"decisions_between": 0, "decisions_within": 0}
        for _ in range(rounds):
            for times, change, kind in ((without, None, "between"), (within, begin, "within")):
                before = sum(world.total(name) for name in DECISIONS)
                if change is not None:
                    await change(world)
                since = time.monotonic()
                await asyncio.sleep(seconds)
                times += answer_times_s(world, since, time.monotonic())
                decided[f"decisions_{kind}"] += sum(world.total(name) for name in DECISIONS) - before
            await end(world)
        world.times[f"{name}_pct"] = 100 * (quantile(within, 0.5) / quantile(without, 0.5) - 1)
        world.facts |= {"compared": min(len(within), len(without)), **decided}

    return act


def slow_readers(count: int, quick_s: float, slow_s: float, tokens: int = 4000) -> Act:
    """So many clients ask for long answers, read all for a while, then one byte a second, then are gone. The p99 of the
    others is compared between the two, which are the same load."""

    async def act(world: World) -> None:
        gateways = world.fleet.of("gateway")
        before = sum(memory_of(one.pid) for one in gateways)
        socks = await _askers(world, count, tokens)
        begun, most = time.monotonic(), before
        try:
            while time.monotonic() - begun < quick_s:
                await asyncio.sleep(0.25)
                for sock in socks:
                    _read(sock, 1 << 16)
            since = time.monotonic()
            world.injected_now()
            while time.monotonic() - since < slow_s:
                await asyncio.sleep(1.0)
                world.facts["cut_off"] = sum([_read(sock, 1) for sock in socks])
                most = max(most, sum(memory_of(one.pid) for one in gateways))
        finally:
            for sock in socks:
                sock.close()
        world.facts["grown_mib"] = (most - before) >> 20
        world.facts["slow_readers"] = len(socks)
        usual, slow = gaps_s(world, begun + quick_s / 2, since), gaps_s(world, since, time.monotonic())
        world.times["others_p99_pct"] = 100 * (quantile(slow, 0.99) / quantile(usual, 0.99) - 1)

    return act


async def _askers(world: World, count: int, tokens: int) -> list[socket.socket]:
    loop, found = asyncio.get_running_loop(), []
    for number in range(count):
        url = world.fleet.urls[number % len(world.fleet.urls)]
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _TIGHT)
        await loop.sock_connect(sock, ("127.0.0.1", int(url.rpartition(":")[2])))
        body = {
            "model": world.clients.load.model,
            "prompt": f"slow {number}",
            "max_tokens": tokens,
            "stream": True,
            "logprobs": 5,
        }
        data = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        await loop.sock_sendall(sock, f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        found.append(sock)
    return found


def _read(sock: socket.socket, size: int) -> bool:
    """What is there, at most `size` bytes; whether the gateway has cut the reader off."""
    try:
        return sock.recv(size) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def burst(count: int, tokens: int, refusals: frozenset[str]) -> Act:
    """So many requests in one moment. Each is answered or refused with Retry-After; then all is as it was."""

    async def act(world: World) -> None:
        usual_s = quantile([end - begun for begun, end in world.clients.asked.answered_at], 0.5)
        limits = httpx.Limits(max_connections=count)
        world.injected_now()
        async with httpx.AsyncClient(limits=limits, trust_env=False) as http:
            crowd = [asyncio.create_task(world.clients.hurried(one, tokens, http)) for one in range(count)]
            await asyncio.sleep(0)
            since = time.monotonic()
            seen = Counter(await asyncio.gather(*crowd))
        world.facts["answered"] = seen.pop("answered", 0)
        world.facts["refused"] = sum(seen.values())
        if wrong := {code: times for code, times in seen.items() if code not in refusals}:
            world.problems.append(f"the crowd got {wrong}")

        def normal() -> float:
            at = [
                end
                for begun, end in world.clients.asked.answered_at
                if begun > since and end - begun < _NORMAL * usual_s
            ]
            return max(0.001, at[0] - since) if at else 0.0

        world.times["recovered_s"] = await until(normal, "short requests to take no longer than before", 60.0)

    return act


def restart_everything() -> Act:
    """SIGKILL to every process, etcd's too, then all start at once while clients ask."""

    async def act(world: World) -> None:
        world.injected_now()
        for service in world.fleet.services:
            await asyncio.to_thread(service.kill)
        for member in world.fleet.etcd:
            await asyncio.to_thread(member.stop)
        await world.fleet.revive_etcd()
        for service in world.fleet.services:
            service.spawn()
        for service in world.fleet.services:
            await asyncio.to_thread(service.wait_ready)
        since = time.monotonic()
        world.times["recovered_s"] = await until(
            lambda: max(0.0, world.clients.asked.first_after(since)), "an answer to a new request", 60.0
        )
        await world.fleet.wait_whole()

    return act


def returned(count: int) -> Act:
    """Wait until so many clients that left have come back."""

    async def act(world: World) -> None:
        world.injected_now()
        with contextlib.suppress(TimeoutError):
            await until(
                lambda: sum(one.returns > 0 for one in world.clients.streams) >= count, "clients to return", 40.0
            )

    return act
