"""A worker that leaks is emptied and ends for a fresh start before its limit is reached; no request fails."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from llmos.lifetime import EXIT_RESTART
from tests.fakes.fleet import running_fleet
from tests.fakes.streams import Streamed, disturbed

LIMIT = 200 * 2**20
STREAMS, TOKENS = 6, 500


@pytest.mark.long
@pytest.mark.timeout(120)
def test_a_leaking_worker_is_drained_before_its_limit(tmp_path: Path) -> None:
    speed = ("--backend", "echo", "--echo-tokens-per-second", "50")
    with running_fleet(tmp_path) as fleet:
        with fleet.together():
            fleet.scheduler()
            leaking = fleet.worker(*speed, "--memory-limit", str(LIMIT), "--echo-leak-bytes", str(400 * 1024))
            fleet.gateway()
        fleet.wait_ready()
        streams = [Streamed(f"stream {number}", TOKENS) for number in range(STREAMS)]

        async def disturb(reached: Callable[[int], Awaitable[None]]) -> None:
            await reached(5)  # all of them run on the one that leaks
            await asyncio.to_thread(fleet.worker, *speed)
            assert await asyncio.to_thread(leaking.popen.wait, 60) == EXIT_RESTART

        verdicts = asyncio.run(disturbed([fleet.http], streams, disturb))
        assert verdicts == {"whole": STREAMS}, [stream.error for stream in streams if stream.error][:3]
        said = re.search(r"to be started afresh: ([\d,]+) of ([\d,]+) bytes of memory", leaking.log.read_text())
        assert said is not None, leaking.log.read_text()[-2000:]
        used, limit = (int(number.replace(",", "")) for number in said.groups())
        assert limit == LIMIT
        assert used < limit
