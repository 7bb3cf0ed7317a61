"""How soon a stall is noticed, and how often nothing was wrong: learned deadlines beside fixed timeouts.

    python -m bench.detection

Streams on four workers of different speed, on virtual time: prompts of 64 to 6400 tokens, noise, slow spells and pauses
of a busy machine; a few streams stop for good in a prefill or between two tokens. Ours is the scheduler's own watch on
real spans, looking as often as it does there. A fixed timeout runs from the last progress of a stage. Both see the same
streams. The picture goes to docs/detection.svg with `--save`.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from opentelemetry.trace import Span

from bench import command
from bench.detection_picture import Point, picture
from bench.rows import Row, at_most, reported
from llmos.telemetry import REQUEST_ID, Telemetry
from scheduler import deadlines
from scheduler.commands import Progress
from scheduler.events import AttemptLate
from scheduler.span_watch import LOOK_S, SpanWatch
from scheduler.spans import ATTEMPT, EXPECTED_S, LOAD, MODEL, TERM, WORKER
from scheduler.timing import FleetTimes, Times

PICTURE = Path(__file__).parents[1] / "docs" / "detection.svg"
FIXED_S = (5.0, 30.0, 120.0)
PEER_S = 30.0
STRICT = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Least bounds of ours, over the usual ones: 1 is what the scheduler does."""
_SPEEDS = (1.0, 1.0, 1.4, 2.5)
_TOKEN_S, _STEP_S = 0.002, 0.03
_STALLED = 0.08
_WARM_S = 30.0
"""Stalls begin after so long; the first streams teach the bounds, but their false alarms count."""


@dataclass(slots=True)
class Stream:
    """What really happens to one stream: when its prefill ends, and when its outputs come."""

    name: str
    worker: int
    prompt: int
    begin_s: float
    times: list[float]
    """Of the first output and of those that follow."""
    stalls_at: float | None = None
    """It makes no progress from then on; `times` end before."""


@dataclass(slots=True)
class Score:
    """What a detector did."""

    delays: list[float] = field(default_factory=list)
    """Seconds from a stall to its notice."""
    false: int = 0
    """Stages that went on after all."""
    missed: int = 0


def draw(seed: int, count: int) -> list[Stream]:
    """Streams by chance."""
    rng, now, streams = random.Random(seed), 0.0, []
    for number in range(count):
        now += rng.expovariate(1.5)
        worker = rng.randrange(len(_SPEEDS))
        prompt = round(64 * 100 ** rng.random())
        prefill = (0.02 + _TOKEN_S * prompt) * _SPEEDS[worker] * rng.lognormvariate(0, 0.25)
        times = [now + prefill]
        for _ in range(rng.randint(20, 150)):
            gap = _STEP_S * _SPEEDS[worker] * rng.lognormvariate(0, 0.3)
            times.append(times[-1] + gap + (rng.uniform(0.2, 0.8) if rng.random() < 0.002 else 0.0))
        stream = Stream(f"r{number}", worker, prompt, now, times)
        if now > _WARM_S and rng.random() < _STALLED:
            _stall(stream, rng, prefill)
        streams.append(stream)
    return streams


def _stall(stream: Stream, rng: random.Random, prefill: float) -> None:
    """It stops somewhere in its prefill, or after one of its outputs."""
    if rng.random() < 0.3:
        stream.stalls_at = stream.begin_s + prefill * rng.random()
        stream.times = []
    else:
        stream.times = stream.times[: rng.randint(1, len(stream.times))]
        stream.stalls_at = stream.times[-1]


def fixed(streams: Sequence[Stream], timeout_s: float) -> Score:
    """A timeout from the last progress."""
    score = Score()
    for stream in streams:
        marks = [stream.begin_s, *stream.times]
        score.false += sum(after - before > timeout_s for before, after in itertools.pairwise(marks))
        if stream.stalls_at is not None:
            score.delays.append(marks[-1] + timeout_s - stream.stalls_at)
    return score


class Watched:
    """The scheduler's watch over the same streams. Implements `Clock` and `span_watch.Fleet`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.watch = SpanWatch(self, self)
        self._telemetry = Telemetry("scheduler", "bench", clock=self, sample_ratio=0.0)
        self._telemetry.watch(self.watch)
        fleet = FleetTimes()
        self._fleet, self._workers = fleet, [Times(fleet) for _ in _SPEEDS]
        self._outputs: dict[str, float] = {}
        self._spans: dict[str, Span] = {}
        self._decoding = [0] * len(_SPEEDS)

    def monotonic(self) -> float:
        return self.now

    def unix_ns(self) -> int:
        return int(self.now * 1e9)

    def output_at(self, request_id: str) -> float:
        return self._outputs.get(request_id, 0.0)

    def still_since(self, worker_id: str) -> float | None:
        return None  # engines step: single streams stall

    def load(self, worker_id: str) -> int:
        return self._decoding[int(worker_id)]

    def score(self, streams: Sequence[Stream]) -> Score:
        """Let all of it happen."""
        alarms: dict[tuple[str, str, float], float] = {}
        todo: list[tuple[float, int, int]] = [(one.begin_s, number, -1) for number, one in enumerate(streams)]
        heapq.heapify(todo)
        look_at, end = 0.0, max(max([*one.times, one.begin_s]) for one in streams) + 150.0
        while look_at < end:
            while todo and todo[0][0] <= look_at:
                self.now, number, index = heapq.heappop(todo)
                stream = streams[number]
                self._happens(stream, index)
                if index + 1 < len(stream.times):
                    heapq.heappush(todo, (stream.times[index + 1], number, index + 1))
            self.now = look_at
            for event in self.watch.look():
                if isinstance(event, AttemptLate):
                    continue  # that costs nobody its place
                last = self._outputs.get(event.request_id, 0.0)
                alarms.setdefault((event.request_id, event.stage, last), look_at)
            look_at += LOOK_S
        return self._judge(streams, alarms)

    def _happens(self, stream: Stream, index: int) -> None:
        """The stream begins (-1), or its next output comes."""
        place, times = str(stream.worker), self._workers[stream.worker]
        about = {REQUEST_ID: stream.name, MODEL: "m", WORKER: place, TERM: 1, ATTEMPT: 1}
        if index < 0:
            decoding = self._decoding[stream.worker]
            expected = times.first_token.seconds(stream.prompt, 0, decoding)
            more = {EXPECTED_S: expected, LOAD: decoding}
            self._spans[stream.name] = self._telemetry.start("prefill", attributes=about | more)
            return
        if index == 0:
            self._telemetry.finish(self._spans[stream.name])
            times.first_token.took(stream.prompt, 0, self._decoding[stream.worker], self.now - stream.begin_s, self.now)
            self._spans[stream.name] = self._telemetry.start("decode", attributes=about)
            self._decoding[stream.worker] += 1
        elif index % 4 == 0:
            gap = self.now - self._outputs[stream.name]
            expected = self._fleet.step_s(self._decoding[stream.worker], prefilling=False)
            self.watch.progressed(Progress(stream.name, place, "m", gap, gap, expected, self._decoding[stream.worker]))
        self._outputs[stream.name] = self.now
        if index + 1 == len(stream.times):
            self._decoding[stream.worker] -= 1
            if stream.stalls_at is None:
                self._telemetry.finish(self._spans.pop(stream.name))

    @staticmethod
    def _judge(streams: Sequence[Stream], alarms: dict[tuple[str, str, float], float]) -> Score:
        score, by_name = Score(), {stream.name: stream for stream in streams}
        noticed: dict[str, float] = {}
        for (name, _, last), at in alarms.items():
            stream = by_name[name]
            final = stream.stalls_at is not None and last == (stream.times[-1] if stream.times else 0.0)
            if final and stream.stalls_at is not None and at >= stream.stalls_at:
                noticed.setdefault(name, at - stream.stalls_at)
            else:
                score.false += 1
        score.delays = list(noticed.values())
        score.missed = sum(stream.stalls_at is not None for stream in streams) - len(noticed)
        return score


def ours(streams: Sequence[Stream], strict: float = 1.0) -> Score:
    """The watch, with its least bounds and cold bounds scaled."""
    rules = {stage: dataclasses.replace(rule, floor_s=rule.floor_s * strict) for stage, rule in deadlines.RULES.items()}
    with mock.patch.dict(deadlines.RULES, rules):
        return Watched().score(streams)


def measure(options: object, save: bool, seeds: Sequence[int], count: int) -> Iterator[Row]:
    """Rows: our detector beside the fixed timeout of 30 s, and the curve."""
    runs = [draw(seed, count) for seed in seeds]
    mine = [ours(streams) for streams in runs]
    peer = [fixed(streams, PEER_S) for streams in runs]
    stages = sum(len(stream.times) for streams in runs for stream in streams)
    medians = [_median(one) for one in mine], [_median(one) for one in peer]
    yield at_most("median seconds until a stall is noticed", "s", *medians, 0.1)
    false = sum(one.false for one in mine), sum(one.false for one in peer)
    yield at_most(f"false alarms in {stages} stages and gaps", "alarms", [false[0]], [false[1]], 1.0)
    missed = sum(one.missed for one in mine)
    yield at_most("stalls that were never noticed", "stalls", [missed], [0], 1.0)
    yield reported("99 % of stalls are noticed within", "s", _share(mine, 0.99), _share(peer, 0.99))
    points = [Point("ours", f"x{strict:g}", _false(scores, stages), _pooled(scores)) for strict, scores in _curve(runs)]
    for timeout in FIXED_S:
        scores = [fixed(streams, timeout) for streams in runs]
        points.append(Point("fixed", f"{timeout:g} s", _false(scores, stages), _pooled(scores)))
    for point in points:
        case = f"{point.kind} {point.name}: median delay at {point.false:.2f} false per 1000"
        yield reported(case, "s", point.delay_s)
    if save:
        PICTURE.write_text(picture(points))


def _curve(runs: Sequence[Sequence[Stream]]) -> Iterator[tuple[float, list[Score]]]:
    for strict in STRICT:
        yield strict, [ours(streams, strict) for streams in runs]


def _median(score: Score) -> float:
    return statistics.median(score.delays) if score.delays else math.inf


def _pooled(scores: Sequence[Score]) -> float:
    return statistics.median([delay for score in scores for delay in score.delays])


def _false(scores: Sequence[Score], stages: int) -> float:
    return 1000 * sum(score.false for score in scores) / stages


def _share(scores: Sequence[Score], share: float) -> float:
    delays = sorted(delay for score in scores for delay in score.delays)
    return delays[min(len(delays) - 1, int(share * len(delays)))]


def main(argv: list[str]) -> int:
    """Entry point; see `command.run` for the exit status."""
    options = command.parser("detection", __doc__ or "", "fewer streams").parse_args(argv)
    seeds, count = (range(2), 300) if options.quick else (range(5), 600)

    def rows(versions: list[str]) -> Iterator[Row]:
        found = measure(options, options.save, seeds, count)
        return (row for row in found if options.only in row.case)

    return command.run("detection", options, rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
