"""Which attempts run here, and which must not: epochs, duplicates, tombstones. Pure; one owner.

For each request the table remembers the highest epoch that it has seen, for a while after its end too, so that a
replayed dispatch is computed once and a cancel wins against a dispatch that arrives after it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from llmos.errors import LlmosError
from llmos.internal.v1 import request_pb2, work_pb2
from llmos.v1 import inference_pb2
from worker.backend import Epoch
from worker.wire import epoch_from_wire, epoch_to_wire

TOMBSTONE_TTL_S = 120.0
"""As long as the scheduler keeps its journal: nothing older can be dispatched again."""
TOMBSTONE_LIMIT = 65_536


class Verdict(Enum):
    """What becomes of a dispatch. `DUPLICATE`, `STALE` and `TOMBSTONE` are not computed."""

    BEGIN = "begin"
    REPLACE = "replace"
    DUPLICATE = "duplicate"
    STALE = "stale"
    TOMBSTONE = "tombstone"


@dataclass(slots=True)
class Running:
    """An attempt that the engine computes."""

    request_id: str
    epoch: Epoch
    model: str
    open_choices: set[int]
    delivered: dict[int, int] = field(default_factory=dict)
    """Choice to the next index expected from the engine."""
    keep_until: dict[int, int] = field(default_factory=dict)
    adapter: str = ""

    def uses(self, model: str) -> bool:
        """Whether it needs a model or adapter of that name."""
        return model in (self.model, self.adapter)

    def next_index(self, choice: int) -> int:
        """Index that the engine's next token of the choice must have."""
        return self.delivered.get(choice, 0)


@dataclass(frozen=True, slots=True)
class _Fence:
    """Epochs up to `epoch` are over, until `expires_s`."""

    epoch: Epoch
    cancelled: bool
    expires_s: float


class AttemptTable:
    """The attempts of one worker. `counts` tells what was refused, by name of the verdict."""

    def __init__(self, *, ttl_s: float = TOMBSTONE_TTL_S, limit: int = TOMBSTONE_LIMIT) -> None:
        self._ttl_s = ttl_s
        self._limit = limit
        self._running: dict[str, Running] = {}
        self._fences: OrderedDict[str, _Fence] = OrderedDict()
        self.counts: Counter[str] = Counter()

    @property
    def running(self) -> Iterable[Running]:
        """Attempts that have neither ended nor been cancelled."""
        return self._running.values()

    def __len__(self) -> int:
        return len(self._running)

    def get(self, request_id: str) -> Running | None:
        """The running attempt of a request."""
        return self._running.get(request_id)

    def judge(self, dispatch: work_pb2.Dispatch, now: float) -> Verdict:
        """Whether a dispatch is to be computed; changes nothing but the counts."""
        verdict = self._judge(dispatch.request.request_id, epoch_from_wire(dispatch.epoch), now)
        self.counts[verdict.value] += 1
        return verdict

    def _judge(self, request_id: str, epoch: Epoch, now: float) -> Verdict:
        fence = self._fences.get(request_id)
        if fence is not None and fence.expires_s > now and not epoch.after(fence.epoch):
            if fence.cancelled:
                return Verdict.TOMBSTONE
            return Verdict.DUPLICATE if epoch == fence.epoch else Verdict.STALE
        running = self._running.get(request_id)
        if running is None:
            return Verdict.BEGIN
        if epoch == running.epoch:
            return Verdict.DUPLICATE
        return Verdict.REPLACE if epoch.after(running.epoch) else Verdict.STALE

    def begin(self, dispatch: work_pb2.Dispatch) -> Running:
        """Enter an attempt judged `BEGIN` or `REPLACE`."""
        request = dispatch.request
        running = Running(
            request_id=request.request_id,
            epoch=epoch_from_wire(dispatch.epoch),
            model=request.model,
            open_choices=set(range(max(1, request.choices))),
            adapter=request.adapter,
        )
        for entry in request.resume:
            running.delivered[entry.choice] = len(entry.token_ids)
            if entry.finished:
                running.open_choices.discard(entry.choice)
        self._running[request.request_id] = running
        return running

    def cancel(self, request_id: str, epoch: Epoch, now: float) -> bool:
        """Leave a tombstone for epochs up to `epoch`. Returns whether a running attempt was among them."""
        running = self._running.get(request_id)
        hit = running is not None and not running.epoch.after(epoch)
        if hit:
            del self._running[request_id]
        self._fence(request_id, epoch, True, now)
        return hit

    def end(self, request_id: str, now: float) -> None:
        """Take out an attempt that has ended; its epoch stays known."""
        running = self._running.pop(request_id, None)
        if running is not None:
            self._fence(request_id, running.epoch, False, now)

    def advance(self, output: request_pb2.Output) -> bool:
        """Take a piece of a running attempt at its next index. Returns whether the attempt is complete with it."""
        running = self._running[output.request_id]
        running.delivered[output.choice] = output.index + len(output.token_ids)
        if output.finish_reason != inference_pb2.FINISH_REASON_UNSPECIFIED:
            running.open_choices.discard(output.choice)
        return self._complete(running)

    def keep(self, request_id: str, choice: int, keep_until: int) -> bool:
        """A choice is wanted only up to index `keep_until`. Returns whether the attempt is complete with that."""
        running = self._running.get(request_id)
        if running is None:
            return False
        running.keep_until[choice] = min(keep_until, running.keep_until.get(choice, keep_until))
        return self._complete(running)

    def is_cancelled(self, request_id: str, epoch: Epoch) -> bool:
        """Whether a tombstone covers the attempt."""
        fence = self._fences.get(request_id)
        return fence is not None and fence.cancelled and not epoch.after(fence.epoch)

    def _complete(self, running: Running) -> bool:
        for choice, limit in running.keep_until.items():
            if running.next_index(choice) >= limit:
                running.open_choices.discard(choice)
        return not running.open_choices

    def _fence(self, request_id: str, epoch: Epoch, cancelled: bool, now: float) -> None:
        old = self._fences.pop(request_id, None)
        if old is not None and old.expires_s > now and old.epoch.after(epoch):
            epoch, cancelled = old.epoch, old.cancelled
        elif old is not None and old.epoch == epoch:
            cancelled = cancelled or old.cancelled
        self._fences[request_id] = _Fence(epoch, cancelled, now + self._ttl_s)
        self._forget(now)

    def _forget(self, now: float) -> None:
        """Fences expire in the order in which they were set; the bound takes the oldest first."""
        while self._fences:
            oldest = next(iter(self._fences))
            if len(self._fences) <= self._limit and self._fences[oldest].expires_s > now:
                return
            del self._fences[oldest]


def cancel_of(running: Running) -> work_pb2.Command:
    """The order to stop an attempt."""
    order = work_pb2.CancelAttempt(request_id=running.request_id, epoch=epoch_to_wire(running.epoch))
    return work_pb2.Command(cancel=order)


def failure_of(request_id: str, epoch: Epoch, error: LlmosError) -> request_pb2.Failure:
    """An attempt's failure by an error of the tree."""
    return request_pb2.Failure(
        request_id=request_id, epoch=epoch_to_wire(epoch), code=error.code, message=error.message
    )
