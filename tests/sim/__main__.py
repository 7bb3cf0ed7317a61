"""`python -m tests.sim`: schedules of faults by seed, or with --mutants the proof that bugs are found."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tests.sim import mutants
from tests.sim.pool import Verdict, as_json, run_seeds
from tests.sim.shrink import shrink
from tests.sim.world import Plan, make_plan, run

_LINES = 60


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns 1 if an invariant was broken, or a seeded bug was not found."""
    options = _parse(argv)
    console = Console(stderr=options.json)
    if options.mutants or options.mutant:
        return _mutants(options, console)
    if options.seed is not None:
        return _one(options.seed, console, dense=options.dense, verbose=options.verbose, whole=not options.shrink)
    return _many(options, console)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="how many schedules to run (default: 200)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--seed", type=int, help="run this one alone, and tell what happened")
    parser.add_argument("--dense", action="store_true", help="several times as many faults in each schedule")
    parser.add_argument("--once", action="store_true", help="run each schedule once, and compare no traces")
    parser.add_argument("--shrink", action="store_true", help="with --seed: the smallest plan that fails the same way")
    parser.add_argument("--verbose", action="store_true", help="with --seed: every line of the run")
    parser.add_argument("--mutants", action="store_true", help="plant every seeded bug and count seeds until found")
    parser.add_argument("--mutant", nargs="+", metavar="NAME", choices=mutants.MUTANTS, help="plant these only")
    parser.add_argument("--list", action="store_true", help="with --mutants: name them and end")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2, help="interpreters (default: one per core)")
    parser.add_argument("--json", action="store_true", help="results as JSON on standard output")
    return parser.parse_args(argv)


def _many(options: argparse.Namespace, console: Console) -> int:
    seeds = range(options.first, options.first + options.seeds)
    counts: Counter[str] = Counter()
    failed: list[Verdict] = []
    faults: Counter[str] = Counter()
    virtual_s, began = 0.0, time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("schedules", total=len(seeds))
        for verdict in run_seeds(seeds, jobs=options.jobs, dense=options.dense, once=options.once):
            counts.update(verdict.counts)
            faults.update(verdict.faults)
            virtual_s += verdict.virtual_s
            if verdict.violations:
                failed.append(verdict)
                progress.print(_line(verdict))
            progress.advance(task)
    took = time.monotonic() - began
    summary = {
        "seeds": len(seeds),
        "violations": sum(len(verdict.violations) for verdict in failed),
        "failed_seeds": sorted(verdict.seed for verdict in failed),
        "faults": faults.total(),
        "faults_by_kind": dict(faults),
        "faults_per_minute": round(60 * faults.total() / took),
        "virtual_hours": round(virtual_s / 3600, 2),
        "seconds": round(took, 1),
        "schedules_per_minute": round(60 * len(seeds) / took),
        "runs_per_minute": round((60 if options.once else 120) * len(seeds) / took),
        "counts": dict(sorted(counts.items())),
    }
    if options.json:
        _say({**summary, "failed": [as_json(verdict) for verdict in failed]})
    else:
        _summarise(console, summary)
    if failed and not options.json:
        _one(min(verdict.seed for verdict in failed), console, dense=options.dense, verbose=False, whole=False)
    return 1 if failed else 0


def _say(report: object) -> None:
    sys.stdout.write(json.dumps(report) + "\n")


def _summarise(console: Console, summary: dict[str, object]) -> None:
    for name, value in summary.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        console.print(f"{name.replace('_', ' '):>22}  {shown}", highlight=False)


def _line(verdict: Verdict) -> str:
    invariant, detail, at_s = verdict.violations[0]
    more = f" and {len(verdict.violations) - 1} more" if len(verdict.violations) > 1 else ""
    return f"seed {verdict.seed} at {at_s - 1000:.3f} s: {invariant}: {detail}{more}"


def _one(seed: int, console: Console, *, dense: bool, verbose: bool, whole: bool) -> int:
    """Run one seed and tell it; shortened first unless the `whole` is wanted."""
    plan = make_plan(seed, dense=dense)
    result = run(plan)
    if result.violations and not whole:
        plan = shrink(plan, result.violations[0].invariant)
    result = run(plan, keep=100_000)
    _describe(plan, console)
    lines = result.lines if verbose or len(result.lines) <= _LINES else result.lines[-_LINES:]
    for line in lines:
        console.print(line, highlight=False, markup=False)
    for violation in result.violations:
        console.print(f"broken: {violation.invariant}: {violation.detail}", highlight=False, markup=False)
    mode = " --dense" if dense else ""
    console.print(f"replay: python -m tests.sim{mode} --seed {seed}   (smaller: --shrink, all lines: --verbose)")
    console.print(f"trace {result.digest}, {result.virtual_s:.1f} virtual seconds, {result.steps} callbacks")
    return 1 if result.violations else 0


def _describe(plan: Plan, console: Console) -> None:
    console.print(f"{plan.schedulers} schedulers, workers with {plan.workers} blocks, {plan.gateways} gateways")
    for order in plan.orders:
        asked = f"{len(order.prompt)}+{order.max_tokens} tokens x {order.choices}, {order.habit} after {order.after}"
        asked += "".join(f", cut off after {one.after} for {one.away_s} s" for one in order.breaks)
        console.print(f"  client{order.number} at {order.at_s:.3f} s, gateway{order.gateway}: {asked}", highlight=False)
    for fault in plan.faults:
        console.print(
            f"  {fault.at_s:.3f} s: {fault.kind} {fault.target} {fault.other} for {fault.lasts_s} s", highlight=False
        )


def _mutants(options: argparse.Namespace, console: Console) -> int:
    names = options.mutant or list(mutants.MUTANTS)
    if options.list:
        for name in names:
            console.print(f"{name:28} {mutants.MUTANTS[name].what}", highlight=False)
        return 0
    rows, missed = [], 0
    for name in names:
        found: Verdict | None = None
        tried = 0
        seeds = range(options.first, options.first + options.seeds)
        dense = options.dense or mutants.MUTANTS[name].dense
        for verdict in run_seeds(
            seeds, jobs=options.jobs, mutant=name, dense=dense, once=True, stop=lambda one: bool(one.violations)
        ):
            tried += 1
            found = verdict if verdict.violations else found
        missed += found is None
        rows.append({"mutant": name, "found": found is not None, "seeds": tried})
        if found is not None:
            rows[-1] |= {"seed": found.seed, "invariant": found.violations[0][0]}
        if not options.json:
            how = f"{found.violations[0][0]} (seed {found.seed})" if found is not None else "NOT FOUND"
            console.print(f"{name:28} {tried:5} seeds  {how}", highlight=False)
    if options.json:
        _say(rows)
    else:
        console.print(f"{len(names) - missed} of {len(names)} seeded bugs found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
