"""Where requests go: the scheduler's core against other routers' rules, in a simulated fleet of fitted engine models.

    python -m bench.routing --quick

Four workloads on three fleets, several seeds each. The core is the real one, with its defaults; the rivals are tuned
for each cell on other seeds. Rows compare ours with the best rival of the cell: p99 of the time to first token, and
goodput.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence

from bench import command
from bench.rows import Row, at_least, at_most
from bench.simulated import settings
from bench.simulated.cells import CELLS, Cell, Result
from bench.simulated.entrants import ENTRANTS, OURS
from bench.simulated.matches import Match, Players
from bench.simulated.settings import Setting

SEEDS, QUICK_SEEDS = 5, 2
REQUESTS, QUICK_REQUESTS = 500, 200
"""Of a run, about; a quarter of its time is not counted."""
QUICK_CELLS = ("shared prompts, 4 equal", "chat, 8 mixed", "documents, 4 equal", "bursty tenants, 4 equal")
SLACK = 0.02
"""So much worse than the best rival ours may be in a cell."""
BETTER = 0.2
"""So much better it is to be in half of the cells."""
Results = Mapping[str, Sequence[Result]]
"""By entrant, in order of seeds."""


def compare(found: Mapping[Cell, Results]) -> Iterator[Row]:
    """Rows of all cells, and how many of them are much better."""
    better_ttft = better_goodput = either = 0
    for cell, results in found.items():
        ttft, goodput = _ttft(cell, results), _goodput(cell, results)
        yield from (ttft, goodput)
        sooner = ttft.ratio is not None and ttft.ratio <= 1 - BETTER
        more = goodput.ratio is not None and goodput.ratio >= 1 + BETTER
        better_ttft, better_goodput, either = better_ttft + sooner, better_goodput + more, either + (sooner or more)
    yield _count("p99 TTFT at least 20 % better", better_ttft, len(found), None)
    yield _count("goodput at least 20 % better", better_goodput, len(found), None)
    yield _count("either at least 20 % better", either, len(found), 0.5)


def _ttft(cell: Cell, results: Results) -> Row:
    late = {name: [one.lateness for one in mine] for name, mine in results.items()}
    best = min((name for name in late if name != OURS), key=lambda name: _middle(late[name]))
    name = f"{cell.name}: p99 TTFT, {best}"
    return at_most(name, "of wanted", late[OURS], late[best], 1 + SLACK)


def _goodput(cell: Cell, results: Results) -> Row:
    goodput = {name: [one.goodput for one in mine] for name, mine in results.items()}
    best = max((name for name in goodput if name != OURS), key=lambda name: _middle(goodput[name]))
    return at_least(f"{cell.name}: goodput, {best}", "tokens/s", goodput[OURS], goodput[best], 1 - SLACK)


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _count(what: str, count: int, cells: int, target: float | None) -> Row:
    share = round(count / cells, 3)
    return Row(f"cells with {what}", count, cells, "cells", share, target, target is None or share >= target)


def measure(players: Players, quick: bool, only: str, runs: int, requests: int, notes: list[str]) -> Iterator[Row]:
    """Play all cells, then compare."""
    stored = settings.stored()
    cells = [cell for cell in CELLS if only in cell.name and (not quick or cell.name in QUICK_CELLS)]
    seeds = range(1, runs + 1)
    matches = [
        match
        for cell in cells
        for entrant in ENTRANTS
        for match in _matches(cell, entrant.name, stored[cell], requests, seeds)
    ]
    results = iter(players.play(matches, "cells"))
    found = {cell: {entrant.name: [next(results) for _ in seeds] for entrant in ENTRANTS} for cell in cells}
    notes += [f"{cell.name}: {stored[cell].rate} arrivals/s; rivals' {stored[cell].parameters}" for cell in cells]
    if found:
        yield from compare(found)


def _matches(cell: Cell, entrant: str, setting: Setting, requests: int, seeds: Sequence[int]) -> Iterator[Match]:
    span = settings.duration(cell, setting.rate, requests)
    for seed in seeds:
        yield Match(cell, entrant, setting.parameters.get(entrant, {}), setting.rate, span, seed)


def main() -> int:
    """See `bench.command`."""
    parser = command.parser("routing", __doc__, "four cells, two seeds, short runs: less than a minute")
    parser.add_argument("--fit", action="store_true", help="measure the real engine, fit the engine model and store it")
    parser.add_argument(
        "--tune", action="store_true", help="find rates and the rivals' parameters again and store them"
    )
    parser.add_argument(
        "--tune-ours", action="store_true", help="show which weights of placement score best over all cells"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help=f"runs of each entrant in each cell; by default {SEEDS}")
    parser.add_argument("--processes", type=int, default=0, metavar="N", help="that simulate; by default one per core")
    parser.add_argument("--requests", type=int, metavar="N", help=f"of each run, about; by default {REQUESTS}")
    options = parser.parse_args()
    seeds = options.seeds or (QUICK_SEEDS if options.quick else SEEDS)
    requests = options.requests or (QUICK_REQUESTS if options.quick else REQUESTS)
    cells = [cell for cell in CELLS if options.only in cell.name]
    if options.fit:
        from bench.simulated.measure import measure_and_store

        return command.run("routing", options, lambda _: measure_and_store())
    with Players(options.processes) as players:
        if options.tune:
            settings.tune(players, cells)
            return 0
        if options.tune_ours:
            for reached, parameters in settings.tune_ours(players, cells):
                print(f"{reached:8.4f}  {dict(parameters)}")
            return 0
        return command.run(
            "routing", options, lambda notes: measure(players, options.quick, options.only, seeds, requests, notes)
        )


if __name__ == "__main__":
    sys.exit(main())
