"""What is left of a fleet's goodput at 2, 5 and 10 times its capacity, what memory that takes, how soon it is over.

    python -m bench.overload

One scheduler, one gateway and one echo worker whose streams run at a fixed speed, so that the capacity is known.
Requests arrive at random (Poisson), each with a deadline, and nobody tries again. Goodput: tokens of requests that were
finished within their deadline, of those that came after the first few seconds. The peak is the best of all loads, the
one at capacity included. After each overload the fleet is probed at a fifth of its capacity: it is normal again once
every later probe gets its first token within a second.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from bench import command, fleets
from bench.client import Target, Trace, send
from bench.rows import Row, at_least, bounded, reported
from bench.service import percentile

SLOTS, SPEED = 32, 10.0
PROMPT, OUTPUT = "x" * 12, 40
DEADLINE_S = 10.0
"""A request takes 4 s when it is alone."""
CAPACITY = SLOTS * SPEED / OUTPUT
"""Requests a second."""
LOADS = (1.0, 2.0, 5.0, 10.0)
SCHEDULER_CAP, GATEWAY_CAP = 192 << 20, 256 << 20
"""Most bytes that the processes may have under any load."""
NORMAL_S, RECOVERY_S = 1.0, 10.0
_WARM_S = 8.0
_PROBE_S = 15.0
_PROBES = 0.2 * CAPACITY
_SAMPLE_S = 0.25
_GOODPUT = 0.95


@dataclass(slots=True)
class Burst:
    """One load."""

    factor: float
    seconds: float
    goodput: float = 0.0
    """Tokens a second."""
    refused_ms: list[float] = field(default_factory=list)
    """How long refusals took."""
    late: int = 0
    """Requests that were accepted and not finished in time."""
    memory: dict[str, int] = field(default_factory=dict)
    recovered_s: float = 0.0


async def _offer(target: Target, rate: float, seconds: float, source: random.Random) -> list[tuple[Trace, float]]:
    """Open loop: traces, and when each ended. Waits for the last."""
    start = time.perf_counter()
    ended: list[tuple[Trace, float]] = []

    async def one(due: float, seed: int) -> None:
        await asyncio.sleep(due - time.perf_counter())
        trace = Trace(due, OUTPUT)
        await send(target, PROMPT, seed, trace)
        ended.append((trace, time.perf_counter()))

    jobs, due = [], start
    while (due := due + source.expovariate(rate)) < start + seconds:
        jobs.append(asyncio.create_task(one(due, len(jobs))))
    await asyncio.wait(jobs, timeout=seconds + 3 * DEADLINE_S)
    return ended


async def _watch(fleet: fleets.Fleet, memory: dict[str, int]) -> None:
    while True:
        for kind in ("scheduler", "gateway"):
            memory[kind] = max(memory.get(kind, 0), fleet.rss(kind))
        await asyncio.sleep(_SAMPLE_S)


async def _burst(fleet: fleets.Fleet, factor: float, seconds: float) -> Burst:
    found = Burst(factor, seconds)
    target = Target(fleet.ports[0], {"model": "echo", "ignore_eos": True}, timeout_s=DEADLINE_S)
    source = random.Random(factor)
    watch = asyncio.create_task(_watch(fleet, found.memory))
    start = time.perf_counter()
    load = asyncio.create_task(_offer(target, factor * CAPACITY, seconds, source))
    await asyncio.sleep(seconds)
    over = time.perf_counter()
    probes = await _offer(target, _PROBES, _PROBE_S, source)
    ended = await load
    watch.cancel()
    _count(found, ended, start)
    slow = [trace.due_s - over for trace, _ in probes if not _prompt(trace)]
    found.recovered_s = max(slow, default=0.0)
    return found


def _prompt(trace: Trace) -> bool:
    return bool(trace.times_s) and trace.times_s[0] - trace.due_s <= NORMAL_S


def _count(found: Burst, ended: Sequence[tuple[Trace, float]], start: float) -> None:
    """Only what arrived between the warm-up and the end counts, over the time in which it could be served."""
    good = 0
    for trace, end in ended:
        if trace.error and not trace.times_s:
            found.refused_ms.append(1000 * (end - trace.due_s))
        in_time = trace.finished and end - trace.due_s <= DEADLINE_S
        found.late += bool(trace.times_s) and not in_time
        if in_time and start + _WARM_S <= end < start + found.seconds:
            good += trace.output_tokens
    found.goodput = good / (found.seconds - _WARM_S)


def _rows(bursts: Sequence[Burst]) -> Iterator[Row]:
    peak = max(burst.goodput for burst in bursts)
    for burst in bursts:
        case = f"{burst.factor:g} times capacity"
        yield reported(f"{case}: goodput of what is possible", "tokens/s", burst.goodput, SLOTS * SPEED)
        if burst.factor == 1.0:
            continue
        yield at_least(f"{case}: goodput of its peak", "tokens/s", [burst.goodput], [peak], _GOODPUT)
        yield reported(f"{case}: refused", "requests", len(burst.refused_ms))
        yield reported(f"{case}: begun and late", "requests", burst.late)
        if burst.refused_ms:
            yield reported(f"{case}: refusal, p99", "ms", percentile(burst.refused_ms, 0.99))
        for kind, cap in (("scheduler", SCHEDULER_CAP), ("gateway", GATEWAY_CAP)):
            yield bounded(f"{case}: memory of the {kind}", "MiB", burst.memory[kind] / 2**20, cap / 2**20)
        yield bounded(f"{case}: normal again after", "s", burst.recovered_s, RECOVERY_S)


def measure(loads: Sequence[float], seconds: float) -> Iterator[Row]:
    """All loads in turn on one fleet."""
    with fleets.fleet(blocks=SLOTS, tokens_per_second=SPEED) as fleet:
        asyncio.run(_offer(Target(fleet.ports[0], {"model": "echo"}), CAPACITY, 3.0, random.Random(0)))
        bursts = [asyncio.run(_burst(fleet, factor, seconds)) for factor in loads]
    yield from _rows(bursts)


def main() -> int:
    """See `bench.command`."""
    options = command.parser("overload", __doc__, "12 s at each load, at 1 and 5 times capacity").parse_args()
    loads = (1.0, 5.0) if options.quick else LOADS
    # The peak is needed by every case.
    chosen = [load for load in loads if load == 1.0 or options.only in f"{load:g} times capacity"]
    return command.run("overload", options, lambda _: measure(chosen, 12.0 if options.quick else 60.0))


if __name__ == "__main__":
    sys.exit(main())
