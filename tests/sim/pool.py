"""Many seeds at once. Every seed runs twice, in two interpreters that hash strings differently.

What depends on the order of a set, or on an address, shows as two traces. Where that is known, once will do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue
from typing import Any

ROOT = Path(__file__).parents[2]
_HASH_SEEDS = ("1", "2")
_SEEDS_EACH = 100
"""For an interpreter: what libraries keep of a world that is over adds up, and slows the collector down."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the runs of one seed came to."""

    seed: int
    digest: str
    violations: tuple[tuple[str, str, float], ...]
    counts: dict[str, int]
    virtual_s: float
    faults: dict[str, int]
    """Injected, by family."""


def judge(first: dict[str, Any], second: dict[str, Any]) -> Verdict:
    """Compare two runs of one seed."""
    violations = [tuple(violation) for violation in first["violations"]]
    if first["digest"] != second["digest"]:
        violations.append(("the same run twice", f"{first['digest']} and {second['digest']}", 0.0))
    return Verdict(
        first["seed"], first["digest"], tuple(violations), first["counts"], first["virtual_s"], first["faults"]
    )


class Child:
    """An interpreter that runs one seed after another: a number goes in, a line of JSON comes out."""

    def __init__(self, hash_seed: str, mutant: str, *, dense: bool) -> None:
        self._environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        self._command = [sys.executable, "-m", "tests.sim.child", "dense" if dense else "plain", mutant]
        self._popen = self._start()
        self._seeds = 0

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._command, cwd=ROOT, env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, seed: int) -> dict[str, Any]:
        """Raises RuntimeError if the interpreter ended."""
        if self._seeds == _SEEDS_EACH:
            self.close()
            self._popen, self._seeds = self._start(), 0
        self._seeds += 1
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._popen.stdin.write(f"{seed}\n")
        self._popen.stdin.flush()
        line = self._popen.stdout.readline()
        if not line:
            raise RuntimeError(f"the simulation ended at seed {seed} with status {self._popen.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it."""
        self._popen.kill()
        self._popen.communicate()


@contextmanager
def _children(count: int, mutant: str, *, dense: bool) -> Iterator[list[Child]]:
    children = [Child(_HASH_SEEDS[number % len(_HASH_SEEDS)], mutant, dense=dense) for number in range(count)]
    try:
        yield children
    finally:
        for child in children:
            child.close()


def run_seeds(
    seeds: Sequence[int],
    *,
    jobs: int,
    mutant: str = "",
    dense: bool = False,
    once: bool = False,
    stop: Callable[[Verdict], bool] = lambda verdict: False,
) -> Iterator[Verdict]:
    """Verdicts as they come, until `stop` says so. `jobs` interpreters are started, two at least."""
    jobs = max(2, jobs + jobs % 2)
    queues = [iter(seeds)] if once else [iter(seeds), iter(seeds)]
    lock = threading.Lock()
    results: Queue[dict[str, Any] | BaseException] = Queue()
    over = threading.Event()

    def work(child: Child, side: int) -> None:
        try:
            while not over.is_set():
                with lock:
                    seed = next(queues[side], None)
                if seed is None:
                    return
                results.put(child.run(seed))
        except BaseException as error:
            results.put(error)

    with _children(jobs, mutant, dense=dense) as children:
        threads = [
            threading.Thread(target=work, args=(child, number % len(queues)), daemon=True)
            for number, child in enumerate(children)
        ]
        for thread in threads:
            thread.start()
        waiting: dict[int, dict[str, Any]] = {}
        left = len(queues) * len(seeds)
        while left and not over.is_set():
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            left -= 1
            other = result if once else waiting.pop(result["seed"], None)
            if other is None:
                waiting[result["seed"]] = result
                continue
            verdict = judge(other, result)
            if stop(verdict):
                over.set()
            yield verdict
        over.set()


def as_json(verdict: Verdict) -> dict[str, Any]:
    """For scripts."""
    return asdict(verdict)
