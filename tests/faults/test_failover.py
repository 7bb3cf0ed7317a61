"""The leading scheduler is frozen, thawed, its heir killed, under streams (`make faults`: 64): no byte changes."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.fakes.fleet import Fleet, Process, running_fleet, wait_for
from tests.fakes.streams import Streamed, disturbed, first_answer_s

log = logging.getLogger(__name__)

STREAMS = int(os.environ.get("LLMOS_TEST_STREAMS", "16"))
TOKENS = 200
SPEED = "10"
LEADER = "/llmos/v1/leader"


def leader_of(fleet: Fleet) -> Process | None:
    """The scheduler that etcd names."""
    shown = fleet.etcd.ctl("get", LEADER, "--print-value-only")
    leading = json.loads(shown)["scheduler_id"] if shown.strip() else ""
    return next((one for one in fleet.processes if one.id == leading), None)


def fenced(fleet: Fleet) -> int:
    """Streams and batches of an older term that the workers ended or refused, by their logs."""
    workers = [process for process in fleet.processes if process.name.startswith("worker")]
    return sum(worker.log.read_text().count("of a lower term") for worker in workers)


async def another_leads(fleet: Fleet, than: Process) -> Process:
    """Wait until etcd names another leader."""
    return await asyncio.to_thread(
        wait_for, lambda: (one := leader_of(fleet)) is not None and one is not than and one, "another leader"
    )


@pytest.mark.timeout(300)
def test_leader_frozen_thawed_and_its_heir_killed_under_streams(tmp_path: Path) -> None:
    with running_fleet(tmp_path) as fleet:
        with fleet.together():
            schedulers = [fleet.scheduler("--lease-ttl-s", "2") for _ in range(2)]
            for _ in range(2):
                fleet.worker("--backend", "echo", "--echo-tokens-per-second", SPEED)
            for _ in range(2):
                fleet.gateway()
        fleet.wait_ready()
        wait_for(lambda: [w["state"] for w in fleet.workers().values()] == ["ready"] * 2, "both workers")
        urls = [f"http://127.0.0.1:{gateway.ready['http_port']}" for gateway in fleet.gateways()]
        streams = [Streamed(f"stream {number}", TOKENS) for number in range(STREAMS)]
        waits: list[float] = []

        async def disturb(reached: Callable[[int], Awaitable[None]]) -> None:
            await reached(10)
            first = leader_of(fleet)
            assert first in schedulers
            first.signal(signal.SIGSTOP)
            waits.append(await first_answer_s(urls))
            heir = await another_leads(fleet, first)
            first.signal(signal.SIGCONT)
            await asyncio.to_thread(wait_for, lambda: fenced(fleet) > 0, "the old leader to be refused")
            await reached(max(len(stream.text) for stream in streams))
            heir.kill()
            waits.append(await first_answer_s(urls))
            assert await another_leads(fleet, heir) is first

        verdicts = asyncio.run(disturbed(urls, streams, disturb))
        log.info("new dispatch after freeze and kill: %s s (target: 5 s)", [round(wait, 2) for wait in waits])
        assert verdicts == {"whole": STREAMS}, [stream.error for stream in streams if stream.error][:3]
        assert fenced(fleet) >= 2
