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


def play(matches: Sequence[Match], what: str) -> list[Result]:
    """All of them. The bar goes to standard error, if that is a terminal."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Processes that are started anew: forked ones would share what a parent with threads has open.
    context = multiprocessing.get_context("spawn")
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=len(matches))
        with context.Pool(min(len(matches), len(os.sched_getaffinity(0))) or 1) as pool:
            found = []
            for result in pool.imap(_play, matches, chunksize=1):
                found.append(result)
                progress.advance(task)
    return found


def _play(match: Match) -> Result:
    return run(match.cell, match.entrant, match.parameters, rate=match.rate, duration=match.duration, seed=match.seed)
