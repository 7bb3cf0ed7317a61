"""Many runs at once, on all processors, with a progress bar; results in the order of what was asked."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench.simulated.cells import Cell, Result, run
from bench.simulated.entrants import Parameters


@dataclass(frozen=True, slots=True)
class Match:
    """One run that is wanted."""

    cell: Cell
    entrant: str
    parameters: Parameters
    rate: float
    duration: float
    seed: int


class Players:
    """Processes that play matches; ended with the context."""

    def __init__(self, count: int = 0) -> None:
        """`count` processes; 0: one per processor."""
        # Started anew: forked ones would share what a parent with threads has open.
        context = multiprocessing.get_context("spawn")
        self._pool = context.Pool(count or len(os.sched_getaffinity(0)))

    def play(self, matches: Sequence[Match], what: str) -> list[Result]:
        """All of them. The bar goes to standard error, if that is a terminal."""
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        found = []
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(what, total=len(matches))
            for result in self._pool.imap(_play, matches, chunksize=1):
                found.append(result)
                progress.advance(task)
                if not progress.console.is_terminal and len(found) % 50 == 0:
                    progress.console.print(f"{what}: {len(found)} of {len(matches)}")
        return found

    def __enter__(self) -> Players:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.terminate()
        self._pool.join()


def _play(match: Match) -> Result:
    return run(match.cell, match.entrant, match.parameters, rate=match.rate, duration=match.duration, seed=match.seed)
