"""Every process of a fleet is restarted, one after another, under streams (`make faults`: 64): no client sees an error.

Whoever has its answer asks again, so that streams begin at every moment of the restart. The short run has one
scheduler, for whose return its streams wait; the long one has a standby, and more gateways.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from llmos.fleet.state import FleetState, read_state
from tests.fakes.streams import Streamed, follow

STREAMS = int(os.environ.get("LLMOS_TEST_STREAMS", "8"))
FULL = STREAMS > 8
TOKENS = 40
SPEED = "40"
CLI = [sys.executable, "-m", "llmos.cli.main"]


def run(*arguments: str) -> str:
    done = subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FleetState]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    places = ("--data-dir", str(tmp_path / "data"), "--http-port", "0", "--grpc-port", "0")
    more = ("--schedulers", "2", "--gateways", "2") if FULL else ()
    sizes = ("--workers", "2", "--echo-tokens-per-second", SPEED, *more)
    try:
        run("up", "--detach", "--backend", "echo", *places, *sizes)
        state = read_state(tmp_path / "data")
        assert state is not None
        yield state
    finally:
        run("down", "--data-dir", str(tmp_path / "data"))


async def keep_asking(
    client: httpx.AsyncClient, url: str, name: str, over: asyncio.Event, seen: list[Streamed]
) -> None:
    while not over.is_set():
        stream = Streamed(f"{name} {len(seen)}", TOKENS)
        seen.append(stream)
        await follow(client, url, stream)


async def restarted(url: str) -> tuple[list[Streamed], dict[str, int]]:
    """All streams of the time around a rolling restart, and what the command printed."""
    over, seen = asyncio.Event(), list[Streamed]()
    limits = httpx.Limits(max_connections=STREAMS)
    async with httpx.AsyncClient(timeout=60, limits=limits) as client, asyncio.TaskGroup() as group:
        for number in range(STREAMS):
            group.create_task(keep_asking(client, url, f"client {number}", over, seen))
        shown = await asyncio.to_thread(run, "restart", "--rolling", "--json")
        over.set()
    return seen, json.loads(shown)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_rolling_restart_of_everything_under_streams(fleet: FleetState, tmp_path: Path) -> None:
    streams, shown = asyncio.run(restarted(fleet.http_url))
    assert shown == {"restarted": len(fleet.members), "total": len(fleet.members)}
    assert Counter(stream.verdict for stream in streams) == {"whole": len(streams)}, [
        stream.error for stream in streams if stream.error
    ][:3]
    after = read_state(tmp_path / "data")
    assert after is not None
    assert {member.name: member.restarts for member in after.members} == {member.name: 1 for member in fleet.members}
    assert {member.process for member in after.members}.isdisjoint(member.process for member in fleet.members)
    assert after.http_url == fleet.http_url
