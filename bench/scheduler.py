"""What a decision costs: the real core, from a request's arrival to its dispatch, and a frame of tokens.

    python -m bench.scheduler --quick --json

1,000 workers, 10,000 waiting requests of 200 tenants, 10^6 blocks in prefix caches; all scores on. Requests have 1,000
prompt tokens and come parsed. Times are the thread's processor time, so that other processes do not count; pauses of
the garbage collector, which is set as the scheduler's process sets it, do.
Ratios are to a fleet of 10 workers with the same queue and caches, measured in turn.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from bench import command
from bench.crowd import FULL, Crowd, Size
from bench.rows import Row, at_most, bounded, reported
from llmos.collector import spare_the_collector
from llmos.internal.v1 import work_pb2
from scheduler.commands import StartAttempt

MEDIAN_US, P99_US, RATIO = 50.0, 500.0, 3.0
LARGE, SMALL = 1000, 10
FRAME_OUTPUTS = 32


@dataclass(slots=True)
class Costs:
    """Microseconds, one figure per event."""

    arrivals: list[float] = field(default_factory=list)
    """A request comes and is dispatched."""
    ends: list[float] = field(default_factory=list)
    """A request ends: its last frame."""
    queued: list[float] = field(default_factory=list)
    """A request comes and has to wait behind all others."""
    frames: list[float] = field(default_factory=list)
    """A frame with a token for each of `FRAME_OUTPUTS` requests."""
    messages: list[float] = field(default_factory=list)
    """A dispatch is written, which the core leaves to the sender."""


def decide(crowd: Crowd, times: int, costs: Costs) -> None:
    """Requests come and end in turn, so that the load stays as it is."""
    for _ in range(times):
        seconds, _ = crowd.timed(crowd.end())
        costs.ends.append(1e6 * seconds)
        seconds, issued = crowd.timed(crowd.arrival())
        costs.arrivals.append(1e6 * seconds)
        crowd.note(issued)
        costs.messages.append(_written(crowd.running[-1]))
        crowd.let_time_pass()


def wait(crowd: Crowd, times: int, costs: Costs) -> None:
    """Requests come for the model that has no room."""
    for _ in range(times):
        seconds, _ = crowd.timed(crowd.arrival(FULL))
        costs.queued.append(1e6 * seconds)


def stream(crowd: Crowd, times: int, costs: Costs) -> None:
    """The busiest workers' steps."""
    for _ in range(times):
        for frame in crowd.steps(FRAME_OUTPUTS):
            seconds, _ = crowd.timed(frame)
            costs.frames.append(1e6 * seconds)
        crowd.let_time_pass()


def _written(start: StartAttempt) -> float:
    batch = work_pb2.AttachRequest()
    begin = time.thread_time()
    start.write(batch.commands.add().dispatch)
    return 1e6 * (time.thread_time() - begin)


def rows(large: Sequence[Costs], small: Sequence[Costs]) -> Iterator[Row]:
    """The table; rounds of both fleets."""
    arrivals, ends = _all(large, "arrivals"), _all(large, "ends")
    yield bounded("arrival to dispatch, median", "us", statistics.median(arrivals), MEDIAN_US)
    yield bounded("arrival to dispatch, p99", "us", _p99(arrivals), P99_US)
    yield at_most(
        f"arrival to dispatch, {LARGE} workers against {SMALL}",
        "us",
        [statistics.median(costs.arrivals) for costs in large],
        [statistics.median(costs.arrivals) for costs in small],
        RATIO,
    )
    yield reported("arrival behind a full queue, median", "us", statistics.median(_all(large, "queued")))
    yield reported("end of a request, median", "us", statistics.median(ends))
    yield reported("end of a request, p99", "us", _p99(ends))
    frames = _all(large, "frames")
    yield reported(f"frame of {FRAME_OUTPUTS} tokens, median", "us", statistics.median(frames))
    yield reported("token of such a frame", "us", statistics.median(frames) / FRAME_OUTPUTS)
    yield reported("dispatch, written by its sender", "us", statistics.median(_all(large, "messages")))


def _all(rounds: Sequence[Costs], name: str) -> list[float]:
    return [value for costs in rounds for value in getattr(costs, name)]


def _p99(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[98]


def run(quick: bool) -> Iterator[Row]:
    """All rows."""
    rounds, times = (2, 500) if quick else (5, 2000)
    crowds = [Crowd(Size(LARGE)), Crowd(Size(SMALL))]
    spare_the_collector()
    found: list[tuple[Costs, ...]] = []
    for _ in range(rounds):
        found.append((Costs(), Costs()))
        for crowd, costs in zip(crowds, found[-1], strict=True):
            decide(crowd, times // 10, Costs())  # warms up
            gc.collect(0)
            decide(crowd, times, costs)
            wait(crowd, times // 10, costs)
            stream(crowd, max(1, times // 100), costs)
    yield from rows([large for large, _ in found], [small for _, small in found])


def main() -> int:
    """See `bench.command`."""
    options = command.parser("scheduler", __doc__, "fewer events").parse_args()
    return command.run("scheduler", options, lambda _: (row for row in run(options.quick) if options.only in row.case))


if __name__ == "__main__":
    sys.exit(main())
