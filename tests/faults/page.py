"""The evidence page, docs/faults.md, and a picture for it, written from one run."""

from __future__ import annotations

import datetime
import json
from dataclasses import asdict
from pathlib import Path

from bench.machine import describe
from tests.faults import report
from tests.faults.scenario import Result
from tests.faults.verdict import Counts

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
PICTURE = PAGE.with_name("migration.svg")
_COUNTS = ("injected", "lost", "duplicated", "corrupted", "stale_accepted")
_HEAD = """# Faults: what was injected, what clients missed

Written by `python -m tests.faults` (`--write-docs`, or `--docs-from` what `--json` printed); do not edit. Real
processes, real requests over HTTP, the tokens of every stream checked one by one. *Lost*: an accepted request without
exactly one end (a result or a typed error), or with a token missing. *Stale accepted*: tokens of an attempt that was
over. Counts are asserted; times are reported beside their targets. `docs/decisions/0020-the-fault-harness.md` says how
it works.

"""


_MISSING = (
    "a bad model version, a worker killed while it saves a checkpoint, a disk full of checkpoints: they come with"
    " versions and jobs",
)


def write(results: list[Result], wall_s: float) -> None:
    """Replace the page."""
    now = datetime.datetime.now(datetime.UTC)
    sums = asdict(report.totals(results))
    lines = [f"{now:%Y-%m-%d %H:%M} UTC, {wall_s:.0f} s, {len(results)} scenarios.", ""]
    lines += [f"- {line}" for line in describe([])]
    lines += ["", "| " + " | ".join(name.replace("_", " ") for name in _COUNTS) + " |", "|" + "---|" * len(_COUNTS)]
    lines += ["| " + " | ".join(str(sums[name]) for name in _COUNTS) + " |", ""]
    if gaps := report.added_gaps(results):
        lines += ["Random single faults, what they added to a stream's longest pause: ", ""]
        lines += [f"- {name.replace('_', ' ')}: {value:g}" for name, value in gaps.items()] + [""]
    for drawn in [result.picture for result in results if result.picture][:1]:
        PICTURE.write_text(drawn)
    if PICTURE.exists():
        lines += ["The trace of one request that moved (`llmos trace ID --svg FILE` draws any):", ""]
        lines += [f"![two attempts, and why the first was given up]({PICTURE.name})", ""]
    for row in dict.fromkeys(result.row for result in results):
        lines += _section(row, [result for result in results if result.row == row])
    lines += ["## Not injected here yet", "", *(f"- {row}" for row in _MISSING)]
    PAGE.write_text(_HEAD + "\n".join(lines).rstrip() + "\n")


def read(paths: list[Path]) -> tuple[list[Result], float]:
    """What `--json` printed, of one run or of several side by side: results, and seconds of the longest."""
    runs = [json.loads(path.read_text()) for path in paths]
    found = []
    for one in (one for run in runs for one in run["scenarios"]):
        counts = Counts(**{name: one[name] for name in _COUNTS})
        times = {name: value for name, value in one.items() if name.endswith(("_s", "_pct")) and value is not None}
        times.pop("wall_s")
        known = {
            "targets": one["targets"],
            "failures": one["failures"],
            "facts": one["facts"],
            "note": one.get("note", ""),
            "gaps": one.get("gaps", []),
        }
        found.append(Result(one["name"], one["row"], one["seed"], counts, times, wall_s=one["wall_s"], **known))
    return found, max(run["wall_s"] for run in runs)


def _section(row: str, results: list[Result]) -> list[str]:
    heads = ["scenario", "seed", *(name.replace("_", " ") for name in _COUNTS), "times (target)", "seen"]
    lines = [f"## {row.capitalize()}", "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for one in results:
        counts = [str(getattr(one.counts, name)) for name in _COUNTS]
        times = "<br>".join(_time(one, name) for name in one.times)
        facts = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in one.facts.items())
        lines.append("| " + " | ".join([one.name, str(one.seed), *counts, times, facts]) + " |")
    lines.append("")
    lines += [f"- *{one.name}*: {one.note}." for one in results if one.note]
    lines += [f"- **{one.name} does not hold**: {'; '.join(one.failures)}" for one in results if not one.ok]
    return [*lines, ""]


def _time(result: Result, name: str) -> str:
    shown = report.measured(name, result.times[name])
    target = result.targets.get(name)
    if target is None:
        return shown
    return f"{shown} ({target:g})" if result.times[name] <= target else f"**{shown}** ({target:g})"
