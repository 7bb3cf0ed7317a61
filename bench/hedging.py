"""Time to the first token with and without hedges, on three workers of which now and then one is slow.

    python -m bench.hedging

The scheduler's own core with its own spans and watch, on virtual time: only workers and clients are simulated. A prompt
takes 0.2 s, give or take; for a tenth of the time, in spells of about three seconds, one of them takes thirty times as
long, now this one, now that one. Requests come at random, at 30 % of what the workers can do. Both sides see the same
requests and the same spells.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from bench import command
from bench.rows import Row, at_most, bounded, reported
from llmos.internal.v1 import registry_pb2, request_pb2, requests_pb2, work_pb2
from llmos.telemetry import Telemetry
from llmos.v1 import fleet_pb2, inference_pb2
from scheduler import commands, events
from scheduler.core import Core
from scheduler.policy import Policy
from scheduler.span_watch import LOOK_S, CoreView, SpanWatch
from scheduler.spans import StageSpans

WORKERS, BLOCKS = 3, 64
_PREFILL_S, _GAP_S, _TOKENS = 0.2, 0.03, 8
_SLOW, _SPELL_S, _SPELL_SHARE = 30.0, 3.0, 0.1
_RATE = 0.3 * WORKERS / _PREFILL_S
_COMPARE_S, _TICK_S, _HOP_S = 0.5, 0.05, 0.001
_STEP_S = 0.25
"""However slow a worker is, it makes a step of its prompt that often."""
_WARM_S = 20.0
"""What comes earlier is not counted: until then nothing is known of what is late."""
_STREAM = 1
_GIB = 1 << 30


@dataclass(slots=True)
class Outcome:
    """What a run came to."""

    ttft: list[float] = field(default_factory=list)
    """Seconds, of requests after the warm-up."""
    counters: Counter[str] = field(default_factory=Counter)
    accepted: int = 0
    work_s: float = 0.0
    """Seconds of prefill that workers have computed."""


class Worker:
    """Reads one prompt at a time, in order of arrival; its streams go on beside that."""

    def __init__(self, name: str, spells: Sequence[tuple[float, float]]) -> None:
        self.name, self.spells = name, spells
        self.queue: list[tuple[str, request_pb2.Epoch]] = []
        self.running: dict[str, request_pb2.Epoch] = {}
        self.serial = self.steps = 0
        self.reads = ""
        """The request whose prompt it reads."""
        self.span = (0.0, 0.0)
        """Since when, and until when."""

    def ends_at(self, now: float, work_s: float) -> float:
        """When so much work is done."""
        for begin, end in self.spells:
            if end <= now:
                continue
            if begin > now:
                if now + work_s <= begin:
                    return now + work_s
                work_s -= begin - now
                now = begin
            if now + work_s * _SLOW <= end:
                return now + work_s * _SLOW
            work_s -= (end - now) / _SLOW
            now = end
        return now + work_s


class Run:
    """One policy before one seed's requests. `Clock` for the watch, `Carrier` for the core's commands."""

    def __init__(self, seed: int, span_s: float, policy: Policy) -> None:
        rng = random.Random(seed)
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._serial = itertools.count()
        self._span_s = span_s
        self._prefill = [rng.lognormvariate(math.log(_PREFILL_S), 0.15) for _ in range(int(2 * _RATE * span_s))]
        self._arrived: list[float] = []
        self._outcome = Outcome()
        spells = _spells(rng, span_s)
        self._workers = {f"w{i}": Worker(f"w{i}", spells[i]) for i in range(WORKERS)}
        self._telemetry = Telemetry("scheduler", "s", clock=self, sample_ratio=0.0)
        self._spans = StageSpans(self._telemetry)
        self._core = Core("s", 1, policy, 0.0)
        self._watch = SpanWatch(CoreView(self._core.state), self)
        self._telemetry.watch(self._watch)
        self._spans.progressed = self._watch.progressed
        when = 0.0
        while (when := when + rng.expovariate(_RATE)) < span_s:
            self._at(when, self._arrive)

    def monotonic(self) -> float:
        """Seconds."""
        return self.now

    def unix_ns(self) -> int:
        """Nanoseconds."""
        return int(self.now * 1e9)

    def outcome(self) -> Outcome:
        """Let all of it happen."""
        self._post(events.GatewayConnected(_STREAM, fleet_pb2.Node(id="g", role=fleet_pb2.NODE_ROLE_GATEWAY)))
        for name in self._workers:
            self._post(events.WorkerRegistered(_record(name)))
            report = work_pb2.WorkerReport(worker_id=name, models=[_model()], numerics_fingerprint="same")
            self._post(events.WorkerAttached(name, report))
        self._post(events.MembersListed())
        for period, act in (
            (_TICK_S, self._tick),
            (_STEP_S, self._step),
            (LOOK_S, self._look),
            (_COMPARE_S, self._compare),
        ):
            self._at(period, self._again, period, act)
        while self._events and (self.now < self._span_s or self._core.state.requests):
            self.now, _, act, arguments = heapq.heappop(self._events)
            act(*arguments)
        self._outcome.counters, self._outcome.accepted = self._core.state.counters, len(self._arrived)
        self._telemetry.shutdown(1.0)
        return self._outcome

    def _at(self, when: float, act: Callable[..., None], *arguments: object) -> None:
        heapq.heappush(self._events, (when, next(self._serial), act, arguments))

    def _again(self, period: float, act: Callable[[], None]) -> None:
        act()
        self._at(self.now + period, self._again, period, act)

    def _tick(self) -> None:
        self._post(events.Tick())
        self._telemetry.drain()

    def _step(self) -> None:
        for worker in self._workers.values():
            if worker.running:
                self._say(worker)

    def _look(self) -> None:
        for event in list(self._watch.look()):
            self._post(event)

    def _compare(self) -> None:
        for event in list(self._watch.compare()):
            self._post(event)

    def _arrive(self) -> None:
        number = len(self._arrived)
        self._arrived.append(self.now)
        request = request_pb2.Request(
            request_id=str(number), tenant="t", model="m", token_ids=range(64), max_tokens=_TOKENS, choices=1
        )
        self._post(events.Submitted(_STREAM, request))

    def _post(self, event: events.Event) -> None:
        for one in self._core.handle(event, self.now):
            if isinstance(one, commands.StartAttempt):
                self._spans.started(one)
                self._at(self.now + _HOP_S, self._dispatched, one.worker_id, one.request.request_id, one.epoch)
                continue
            self._spans.observe(one)
            if isinstance(one, commands.Order) and one.command.WhichOneof("order") == "cancel":
                self._at(self.now + _HOP_S, self._cancelled, one.worker_id, one.command.cancel)
            elif isinstance(one, commands.SendOutput) and not one.output.index:
                arrived = self._arrived[int(one.output.request_id)]
                if arrived >= _WARM_S:
                    self._outcome.ttft.append(self.now - arrived)

    # -- workers

    def _dispatched(self, name: str, request_id: str, epoch: request_pb2.Epoch) -> None:
        worker = self._workers[name]
        worker.running[request_id] = epoch
        worker.queue.append((request_id, epoch))
        self._read(worker)

    def _cancelled(self, name: str, order: work_pb2.CancelAttempt) -> None:
        worker = self._workers[name]
        if worker.running.get(order.request_id) == order.epoch:
            del worker.running[order.request_id]
            worker.queue = [one for one in worker.queue if one[0] != order.request_id]
            if worker.reads == order.request_id:
                begin, end = worker.span
                self._outcome.work_s += self._prefill[int(order.request_id)] * (self.now - begin) / (end - begin)
                worker.reads = ""
                self._read(worker)

    def _read(self, worker: Worker) -> None:
        if worker.reads or not worker.queue:
            return
        request_id, epoch = worker.queue.pop(0)
        worker.reads = request_id
        end = worker.ends_at(self.now, self._prefill[int(request_id)])
        worker.span = (self.now, end)
        self._at(end, self._has_read, worker, request_id, epoch)

    def _has_read(self, worker: Worker, request_id: str, epoch: request_pb2.Epoch) -> None:
        if worker.running.get(request_id) != epoch:
            return
        worker.reads = ""
        self._outcome.work_s += self._prefill[int(request_id)]
        self._speak(worker, request_id, epoch, 0)
        self._read(worker)

    def _speak(self, worker: Worker, request_id: str, epoch: request_pb2.Epoch, index: int) -> None:
        if worker.running.get(request_id) != epoch:
            return
        output = request_pb2.Output(request_id=request_id, epoch=epoch, index=index, token_ids=[1])
        if index + 1 == _TOKENS:
            output.finish_reason = inference_pb2.FINISH_REASON_LENGTH
            del worker.running[request_id]
        else:
            self._at(worker.ends_at(self.now, _GAP_S), self._speak, worker, request_id, epoch, index + 1)
        self._say(worker, output)

    def _say(self, worker: Worker, *outputs: request_pb2.Output) -> None:
        worker.serial += 1
        worker.steps += 1
        frame = work_pb2.WorkFrame(sequence=worker.serial, step=worker.steps, busy=bool(worker.running))
        frame.outputs.extend(outputs)
        self._at(self.now + _HOP_S, self._post, events.WorkerFrame(worker.name, frame))


def _spells(rng: random.Random, span_s: float) -> list[list[tuple[float, float]]]:
    found: list[list[tuple[float, float]]] = [[] for _ in range(WORKERS)]
    now = 0.0
    while now < span_s:
        now += rng.expovariate(_SPELL_SHARE / _SPELL_S / (1.0 - _SPELL_SHARE))
        length = _SPELL_S * rng.uniform(0.5, 1.5)
        rng.choice(found).append((now, now + length))
        now += length
    return found


def _record(worker_id: str) -> registry_pb2.WorkerRecord:
    device = fleet_pb2.Device(id="cpu", kind=fleet_pb2.DEVICE_KIND_CPU, memory_bytes=16 * _GIB)
    model = requests_pb2.CatalogueModel(name="m", version="1", context_length=4096)
    return registry_pb2.WorkerRecord(
        worker_id=worker_id,
        address=f"{worker_id}:1",
        backend="echo",
        capacity=fleet_pb2.Capacity(devices=[device]),
        models=[registry_pb2.ModelRecord(model=model, weight_bytes=_GIB)],
    )


def _model() -> fleet_pb2.NodeModel:
    state = fleet_pb2.MODEL_STATE_LOADED
    return fleet_pb2.NodeModel(name="m", version="1", state=state, total_blocks=BLOCKS, free_blocks=BLOCKS)


def measure(seeds: Sequence[int], span_s: float) -> Iterator[Row]:
    """Rows: with hedges beside without."""
    ours = [Run(seed, span_s, Policy()).outcome() for seed in seeds]
    without = [Run(seed, span_s, Policy(hedge=False)).outcome() for seed in seeds]
    for share, target in ((0.999, 0.5), (0.99, 0.8), (0.95, None), (0.5, 1.1)):
        times = [[1000 * _share(one.ttft, share) for one in side] for side in (ours, without)]
        yield at_most(f"time to first token, {100 * share:g} %", "ms", times[0], times[1], target)
    hedges, accepted = sum(one.counters["hedges"] for one in ours), sum(one.accepted for one in ours)
    yield bounded("hedges, of requests", "%", 100 * hedges / accepted, 5.0)
    won = sum(one.counters["hedges_won"] for one in ours)
    yield reported("hedges that had the first token", "%", 100 * won / max(1, hedges))
    yield at_most("prefill work", "s", [one.work_s for one in ours], [one.work_s for one in without], 1.05)


def _share(times: list[float], share: float) -> float:
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main(argv: list[str]) -> int:
    """Entry point; see `command.run` for the exit status."""
    options = command.parser("hedging", __doc__ or "", "shorter runs").parse_args(argv)
    seeds, span_s = (range(2), 200.0) if options.quick else (range(5), 400.0)

    def rows(versions: list[str]) -> Iterator[Row]:
        return (row for row in measure(seeds, span_s) if options.only in row.case)

    return command.run("hedging", options, rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
