"""The scenarios marked quick, as `python -m tests.faults --quick` runs them. All of them: `make faults`."""

from __future__ import annotations

import asyncio
import os

import pytest

from tests.faults.ledger import HOME
from tests.faults.plan import planned
from tests.faults.runner import Runner
from tests.faults.scenario import Result


async def play() -> list[Result]:
    async with Runner(lambda news: None) as runner:
        return [
            result
            for scenario, seed in planned(quick=True, seeds=None, first=0, only="")
            for result in await runner.run([scenario], seed)
        ]


@pytest.mark.timeout(300)
def test_no_byte_is_lost_repeated_or_changed() -> None:
    results = asyncio.run(play())
    assert len(results) >= 3
    assert [(one.name, one.counts, one.failures) for one in results if not one.ok] == []
    assert all(one.counts.injected for one in results)
    assert not list(HOME.glob(f"run-{os.getpid()}-*")), "what the harness makes is taken back"
