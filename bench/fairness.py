"""Do tenants get what their weights say, and what does fair order cost against first come, first served?

    python -m bench.fairness

Shares: one scheduler, two gateways and two echo workers whose streams run at a fixed speed, all saturated for a minute.
A tenant of weight 4 and one of weight 1; the light one has three times as many clients, and of its requests nine in
ten come through the first gateway, of the heavy one's one in ten. A tenant's share is that of the tokens that it gets
after the first seconds.

Throughput: a fleet whose workers are as fast as they can, saturated by the same clients, in fair order and first come
first served, in pairs of which each begins with the other one. The ratio of a pair's throughputs is given with a 95 %
interval of its mean by Student's t.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import command, fleets
from bench.client import Target, Trace, saturate
from bench.rows import Row, at_least, bounded, reported
from llmos.keys import LimitsChange, add_key

HEAVY, LIGHT = "heavy", "light"
WEIGHTS = {HEAVY: 4, LIGHT: 1}
OUTSTANDING = {HEAVY: 150, LIGHT: 450}
"""Clients of each tenant: either could fill the fleet alone, so that both always wait."""
SKEW = {HEAVY: 0.1, LIGHT: 0.9}
"""Part of a tenant's clients that the first gateway has."""
SLOTS, SPEED, OUTPUT = 32, 10.0, 20
TOLERANCE = 0.02
THROUGHPUT = 0.98
_T_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Student's t for 95 % on both sides, by number of pairs."""
_PATIENT = ("--ttft-bounds-s", "100000,100000,100000", "--queue-limit", "10000")
_FIELDS = {"model": "echo", "ignore_eos": True}


def _keys(file: Path) -> dict[str, str]:
    return {tenant: add_key(file, tenant, limits=LimitsChange(weight=weight))[0] for tenant, weight in WEIGHTS.items()}


def _work(output: int) -> Iterator[tuple[str, int, int]]:
    return (("x" * 12, output, number) for number in itertools.count())


def _clients(count: int, tenant: str) -> tuple[int, int]:
    first = round(count * SKEW[tenant])
    return first, count - first


async def _saturate(
    ports: Sequence[int], keys: dict[str, str], clients: dict[str, int], seconds: float, output: int
) -> dict[str, list[Trace]]:
    """Traces of each tenant's requests."""
    jobs = {
        (tenant, place): saturate(Target(port, _FIELDS, key=keys[tenant]), _work(output), count, seconds)
        for tenant in WEIGHTS
        for place, (port, count) in enumerate(zip(ports, _clients(clients[tenant], tenant), strict=True))
    }
    traces = dict(zip(jobs, await asyncio.gather(*jobs.values()), strict=True))
    return {
        tenant: [trace for (name, _), found in traces.items() if name == tenant for trace in found]
        for tenant in WEIGHTS
    }


def shares(seconds: float, warm_s: float) -> Iterator[Row]:
    """Of the tokens that came after the first `warm_s` seconds."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "keys.json"
        keys = _keys(file)
        options = ("--keys-file", str(file))
        with fleets.fleet(
            gateways=2, workers=2, blocks=SLOTS, tokens_per_second=SPEED, scheduler=_PATIENT, gateway=options
        ) as fleet:
            start = time.perf_counter()
            traces = asyncio.run(_saturate(fleet.ports, keys, OUTSTANDING, warm_s + seconds, OUTPUT))
    tokens = {tenant: _tokens(traces[tenant], start + warm_s, start + warm_s + seconds) for tenant in WEIGHTS}
    heavy = tokens[HEAVY] / max(1, sum(tokens.values()))
    wanted = WEIGHTS[HEAVY] / sum(WEIGHTS.values())
    yield reported(
        "shares: tokens, of what the workers can", "tokens/s", sum(tokens.values()) / seconds, 2 * SLOTS * SPEED
    )
    yield reported("shares: heavy tenant's, of what its weight says", "share", heavy, wanted)
    yield bounded("shares: off by", "share", abs(heavy - wanted), TOLERANCE)


def _tokens(traces: Sequence[Trace], start: float, end: float) -> int:
    return sum(start <= moment < end for trace in traces for moment in trace.times_s)


def throughput(pairs: int, seconds: float) -> Iterator[Row]:
    """Fair order over first come first served."""
    found: dict[str, list[float]] = {"fair": [], "fcfs": []}
    for number in range(pairs):
        for order in ("fair", "fcfs") if number % 2 == 0 else ("fcfs", "fair"):
            found[order].append(_throughput(order, seconds))
    ratios = [fair / fcfs for fair, fcfs in zip(found["fair"], found["fcfs"], strict=True)]
    yield at_least("throughput: fair, of first come first served", "tokens/s", found["fair"], found["fcfs"], THROUGHPUT)
    half = _T_95[len(ratios)] * statistics.stdev(ratios) / math.sqrt(len(ratios))
    mean = statistics.mean(ratios)
    yield reported("throughput: mean ratio, and half of its 95 % interval", "ratio", mean, half)


def _throughput(order: str, seconds: float) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "keys.json"
        keys = _keys(file)
        options = ("--keys-file", str(file))
        with fleets.fleet(gateways=2, blocks=SLOTS, scheduler=("--order", order, *_PATIENT), gateway=options) as fleet:
            start = time.perf_counter()
            traces = asyncio.run(_saturate(fleet.ports, keys, {HEAVY: 40, LIGHT: 40}, seconds + 2.0, OUTPUT))
    return sum(_tokens(traces[tenant], start + 2.0, start + 2.0 + seconds) for tenant in WEIGHTS) / seconds


def _measure(only: str, *, quick: bool) -> Iterator[Row]:
    if only in "shares":
        yield from shares(15.0 if quick else 60.0, 12.0)
    if only in "throughput":
        yield from throughput(2 if quick else 6, 3.0 if quick else 8.0)


def main() -> int:
    """See `bench.command`."""
    options = command.parser("fairness", __doc__, "a quarter of a minute of shares, and two short pairs").parse_args()
    return command.run("fairness", options, lambda _: _measure(options.only, quick=options.quick))


if __name__ == "__main__":
    sys.exit(main())
