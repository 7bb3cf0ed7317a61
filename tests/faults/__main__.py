"""`python -m tests.faults`: kill, freeze and cut off real processes under load, and count what clients miss.

Counts are asserted: exit status 1 if anything was lost, duplicated, corrupted or accepted though stale, or if a check
failed. Times are reported beside their targets.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from pathlib import Path

from rich.console import Console

from tests.faults import page, report
from tests.faults.ledger import sweep
from tests.faults.plan import planned
from tests.faults.runner import Runner
from tests.faults.scenario import Result, Scenario


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    options = _parse(argv)
    console = Console(stderr=options.json, highlight=False)
    if options.docs_from:
        page.write(*page.read(options.docs_from))
        return 0
    scenarios = planned(
        quick=options.quick,
        seeds=options.seeds,
        first=options.first,
        only=options.only,
        long=options.long,
        backend=options.backend,
    )
    if options.list:
        for scenario, seed in scenarios:
            console.print(f"{scenario.name:40} seed {seed:<4} {scenario.row}", markup=False)
        return 0
    if not scenarios:
        console.print(f"no scenario's name contains {options.only!r}: --list shows them all", markup=False)
        return 2
    if left := sweep():
        console.print(f"cleaned up after {left} interrupted runs")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    progress = report.Progress(console, len(scenarios))
    began = time.monotonic()
    results: list[Result] = []
    interrupted = False
    try:
        asyncio.run(_run(scenarios, progress, results, write_docs=options.write_docs))
    except KeyboardInterrupt:
        interrupted = True
        console.print("interrupted; everything that was made is taken back")
    if options.json:
        sys.stdout.write(json.dumps(report.as_json(results, time.monotonic() - began)) + "\n")
    else:
        report.summarise(console, results, time.monotonic() - began)
    if interrupted:
        return 130
    return 0 if all(result.ok for result in results) else 1


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only the scenarios that `make test` runs")
    parser.add_argument("--backend", choices=("echo", "torch"), default="echo", help="what computes (default: echo)")
    parser.add_argument("--long", action="store_true", help="etcd is gone for 10 minutes instead of one")
    parser.add_argument("--seeds", type=int, metavar="N", help="so many random single faults, half of them on torch")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the first seed (default: 0)")
    parser.add_argument(
        "--only", default="", metavar="NAME", help="only scenarios whose name contains NAME, or one of NAME,NAME"
    )
    parser.add_argument("--json", action="store_true", help="results as JSON on standard output")
    parser.add_argument("--list", action="store_true", help="name the scenarios and end")
    parser.add_argument("--write-docs", action="store_true", help="write docs/faults.md from this run")
    parser.add_argument(
        "--docs-from", type=Path, nargs="+", metavar="FILE", help="write docs/faults.md from what --json printed"
    )
    return parser.parse_args(argv)


async def _run(
    scenarios: list[tuple[Scenario, int]], progress: report.Progress, results: list[Result], *, write_docs: bool
) -> None:
    """Results are added as they come: an interrupted run has some too."""
    began = time.monotonic()
    async with Runner(progress.told) as runner:
        for scenario, seed in scenarios:
            results += await runner.run([scenario], seed)
            if write_docs:  # after each one: an interrupted run has its page too
                page.write(results, time.monotonic() - began)


if __name__ == "__main__":
    sys.exit(main())
