"""Plays scenarios one after another; those of one shape on one fleet."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.faults.fleet import Fleet
from tests.faults.ledger import HOME, Ledger
from tests.faults.scenario import Result, Scenario, Shape
from tests.faults.verdict import Counts
from tests.faults.world import play

_LIMIT_S = 180.0
"""For one scenario, beside twice its clients' patience."""
Told = Callable[[Result | str], None]


class Runner:
    """Owns the fleet that stands. `async with Runner(tell) as runner: await runner.run(scenarios, seed)`."""

    def __init__(self, tell: Told, keep: bool = True) -> None:
        self._tell = tell
        self._keep = keep
        self._ledger: Ledger | None = None
        self._fleet: Fleet | None = None
        self._shapes = 0

    async def __aenter__(self) -> Runner:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._drop()

    async def run(self, scenarios: Iterable[Scenario], seed: int) -> list[Result]:
        """Results in order; each is told as it comes."""
        found = []
        for scenario in scenarios:
            self._tell(scenario.name)
            result = await self._one(scenario, seed)
            self._tell(result)
            found.append(result)
        return found

    async def _one(self, scenario: Scenario, seed: int) -> Result:
        try:
            async with asyncio.timeout(_LIMIT_S + 2 * scenario.load.patience_s):
                fleet = await self._standing(scenario.shape)
                result = await play(scenario, seed, fleet)
        except (Exception, ExceptionGroup) as error:
            result = Result(scenario.name, scenario.row, seed, Counts(), failures=[_told(error)])
        if not result.ok:
            self._save(result)
            await self._drop()
        return result

    async def _standing(self, shape: Shape) -> Fleet:
        if self._fleet is not None and self._fleet.shape == shape:
            try:
                await self._fleet.heal()
            except (TimeoutError, RuntimeError) as error:
                raise RuntimeError(f"the fleet did not recover from the scenario before: {error}") from error
            return self._fleet
        await self._drop()
        self._shapes += 1
        self._ledger = Ledger(f"-{self._shapes}")
        self._fleet = await Fleet(shape, self._ledger).__aenter__()
        return self._fleet

    async def _drop(self) -> None:
        fleet, self._fleet = self._fleet, None
        ledger, self._ledger = self._ledger, None
        try:
            if fleet is not None:
                await fleet.close()
        finally:
            if ledger is not None:
                await asyncio.to_thread(ledger.undo)

    def _save(self, result: Result) -> None:
        """Keep the logs of a failure."""
        if self._ledger is None or not self._keep:
            return
        target: Path = HOME / "failed" / f"{result.name.replace(' ', '-').replace('/', '-')}-{result.seed}"
        shutil.rmtree(target, ignore_errors=True)
        with contextlib.suppress(shutil.Error, OSError):
            shutil.copytree(self._ledger.folder, target, ignore=shutil.ignore_patterns("data", "*.sock"))
        result.failures.append(f"logs: {target}")


def _told(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"
