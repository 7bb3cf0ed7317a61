"""What the benchmarks' command lines share: options, printing as rows come, saving, exit status.

Status 0: every target met; 1: some missed; 2: nothing could be measured, for the reason printed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from bench import rows
from bench.limits import NoCompiler
from bench.machine import describe
from bench.peers.places import MissingPeer
from bench.rows import Row
from bench.sides.side import SideError
from llmos.errors import LlmosError

RESULTS = Path(__file__).parent / "results"
EXIT_MISSED, EXIT_ERROR = 1, 2
BUSY = 0.7
"""Load from which figures are doubtful: llama.cpp's threads, for one, wait for each other without sleeping."""


def parser(name: str, description: str, quick: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description.split("\n")[0])
    made.add_argument("--quick", action="store_true", help=quick)
    made.add_argument("--json", action="store_true", help="print one JSON array of the rows and nothing else")
    made.add_argument(
        "--save", action="store_true", help=f"append the table and the machine to bench/results/{name}.md"
    )
    made.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    return made


def run(name: str, options: argparse.Namespace, measure: Callable[[list[str]], Iterable[Row]]) -> int:
    """Print what `measure` yields and return the exit status. It adds the peers' versions to the list it is given."""
    versions: list[str] = []
    found: list[Row] = []
    if (load := os.getloadavg()[0]) > BUSY:
        print(f"warning: the machine is busy (load {load:.1f}), which hurts sides that spin most", file=sys.stderr)
    # As an exception, so that the peers' processes are ended.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        found.extend(_shown(measure(versions), options.json))
    except (MissingPeer, NoCompiler, SideError, LlmosError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    finally:
        signal.signal(signal.SIGTERM, before)
    if options.json:
        print(rows.as_json(found))
    if options.save:
        save(
            RESULTS / f"{name}.md",
            found,
            [*versions, f"load at the start {load:.1f}"],
            datetime.datetime.now(datetime.UTC),
        )
    return 0 if all(row.ok for row in found) else EXIT_MISSED


def save(path: Path, found: Iterable[Row], versions: Iterable[str], now: datetime.datetime) -> None:
    """Append the table and what it was measured on."""
    path.parent.mkdir(exist_ok=True)
    lines = "\n".join(f"- {line}" for line in describe(versions))
    with path.open("a") as out:
        out.write(f"## {now:%Y-%m-%d %H:%M} UTC\n\n{lines}\n\n{rows.markdown(found)}\n\n")


def _shown(found: Iterable[Row], silent: bool) -> Iterator[Row]:
    if not silent:
        print(rows.heading(), flush=True)
    for row in found:
        if not silent:
            print(rows.line(row), flush=True)
        yield row
