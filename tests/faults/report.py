"""What a run says: a line per scenario as it ends, a table, JSON, and the evidence page."""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from tests.faults.scenario import Result
from tests.faults.verdict import Counts, quantile

SINGLES = "random single faults"
"""The row of what `added_gaps` is about."""


class Progress:
    """A line per scenario; on a terminal also what runs now."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._done = 0
        self._status = console.status("")

    def told(self, news: Result | str) -> None:
        """A scenario begins (its name) or has ended (its result)."""
        if isinstance(news, str):
            self._status.update(f"{self._done + 1} of {self._total}: {news}")
            if self._console.is_terminal:
                self._status.start()
            return
        self._status.stop()
        self._done += 1
        mark = "ok  " if news.ok else "FAIL"
        times = ", ".join(_time(news, name) for name in news.times)
        text = f"{mark} {self._done:3}/{self._total} {news.name:34} {news.wall_s:5.1f} s  {times}"
        self._console.print(text, markup=False, soft_wrap=True)
        for failure in [*_complaints(news.counts), *news.failures]:
            self._console.print(f"         {failure}", markup=False, soft_wrap=True)


def totals(results: list[Result]) -> Counts:
    """Sums."""
    found = Counts()
    for result in results:
        found.add(result.counts)
    return found


def as_json(results: list[Result], wall_s: float) -> dict[str, object]:
    """`scenarios` and `totals`."""
    rows = []
    for one in results:
        times = {"detection_s": None, "gap_s": None, **one.times}
        rows.append(
            {
                "name": one.name,
                "row": one.row,
                "seed": one.seed,
                "ok": one.ok,
                **asdict(one.counts),
                **times,
                "targets": dict(one.targets),
                "facts": one.facts,
                "note": one.note,
                "gaps": one.gaps,
                "failures": one.failures,
                "wall_s": one.wall_s,
            }
        )
    sums = {**asdict(totals(results)), **added_gaps(results)}
    return {"scenarios": rows, "totals": sums, "wall_s": round(wall_s, 1)}


def added_gaps(results: list[Result]) -> dict[str, float]:
    """Seconds that random single faults added to a stream's longest pause: p50 and p99, by backend."""
    found: dict[str, float] = {}
    for backend in ("echo", "torch"):
        chosen = [one for one in results if one.row == SINGLES and one.name.endswith("(torch)") is (backend == "torch")]
        gaps = [gap for one in chosen for gap in one.gaps]
        if gaps:
            found |= {f"added_gap_{backend}_p{share}_s": quantile(gaps, share / 100) for share in (50, 99)}
            found[f"{backend}_random_faults"] = len(chosen)
    return found


def summarise(console: Console, results: list[Result], wall_s: float) -> None:
    """The table of totals, and what is late."""
    late = [(result, name) for result in results for name in result.late]
    if late:
        table = Table("scenario", "time", "seconds", "target", title="times past their targets", title_justify="left")
        for result, name in late:
            table.add_row(result.name, name, f"{result.times[name]:.2f}", f"{result.targets[name]:g}")
        console.print(table)
    sums = asdict(totals(results))
    failed = [result.name for result in results if not result.ok]
    console.print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in sums.items()))
    if gaps := added_gaps(results):
        console.print(", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in gaps.items()))
    console.print(f"{len(results) - len(failed)} of {len(results)} scenarios hold, in {wall_s:.0f} s")
    if failed:
        console.print(f"failed: {', '.join(failed)}")


def _complaints(counts: Counts) -> list[str]:
    return [f"{name} {value}" for name, value in asdict(counts).items() if value and name != "injected"]


def measured(name: str, value: float) -> str:
    """What was measured, with its unit, which the name ends in: `_s` or `_pct`."""
    if name.endswith("_pct"):
        return f"{name.removesuffix('_pct').replace('_', ' ')} {value:+.1f} %"
    return f"{name.removesuffix('_s').replace('_', ' ')} {value:.2f} s"


def _time(result: Result, name: str) -> str:
    target = result.targets.get(name)
    shown = measured(name, result.times[name])
    return shown if target is None else f"{shown} (target {target:g}{', LATE' if result.times[name] > target else ''})"
