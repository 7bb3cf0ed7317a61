"""Where a request goes given what has happened: to itself elsewhere, and to the worker. The scores, put together.

What a request has tried counts most: a second attempt goes where none has failed or stalled, while there is such a
place. Then come numerics, the worker that still runs it, a worker on trial, and the least cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from scheduler.placement import (
    ANSWER_TOKENS,
    Ask,
    BestThenSpread,
    FastDecode,
    FirstTokenSoon,
    Handful,
    HasRoom,
    Holders,
    Home,
    LeastLoaded,
    LittleDisturbance,
    LittleWork,
    LowPressure,
    Option,
    Overlap,
    Placement,
    Roomiest,
    RoomIndex,
    SameNumerics,
    Scorer,
    TenantSpread,
)
from scheduler.policy import PlacementWeights
from scheduler.recent import Recent
from scheduler.requests import LiveRequest
from scheduler.workers import LOADED, WorkerView

_GAP_SHARE = 0.05
"""Of the gaps in an answer that are slow ones."""


@dataclass(frozen=True, slots=True)
class NotAgain:
    """No worker on which this request stalled, while another that takes work could hold it, be it full just now."""

    index: RoomIndex
    clock: Callable[[], float]
    patience_s: float

    def admits(self, ask: Ask, option: Option) -> bool:
        live = ask.live
        if option.worker.id not in live.avoid or self.clock() - live.waits_since > self.patience_s:
            return True
        return not any(self._could(live, worker) for worker in self.index.workers.values())

    @staticmethod
    def _could(live: LiveRequest, worker: WorkerView) -> bool:
        slot = worker.slot_for(live.key)
        if slot is None or not worker.usable or worker.id in live.avoid or slot.state != LOADED:
            return False
        return slot.total_blocks >= live.blocks and (live.adapter is None or worker.loaded(live.adapter))


@dataclass(frozen=True, slots=True)
class OneSuspect:
    """Filter of placement: nothing new is put beside a suspect until it is cleared, and it beside nothing that has only
    just begun, or is the same as another suspect. That takes a few tokens; who is overtaken too often meanwhile is not
    overtaken any more."""

    requests: Mapping[str, LiveRequest]
    suspected: Recent[str]
    clock: Callable[[], float]

    def admits(self, ask: Ask, option: Option) -> bool:
        """See `placement.Filter`."""
        worker = option.worker
        if worker.suspect:
            return False
        if not ask.live.suspect:
            return True
        running = worker.running
        return all(attempt.settled for attempt in running.values()) and not any(
            self._another(ask.live, self.requests[request_id]) for request_id in running
        )

    def _another(self, live: LiveRequest, beside: LiveRequest) -> bool:
        return beside.mark != live.mark and self.suspected.get(beside.mark, self.clock()) is not None


class Untried:
    """A worker on which this request has not been lost before."""

    def scores(self, ask: Ask, options: Sequence[Option]) -> Sequence[float]:
        tried = ask.live.tried
        return [-float(option.worker.id in tried) for option in options] if tried else ()


@dataclass(frozen=True, slots=True)
class Trial:
    """A worker on trial is given the next request, unless that was tried elsewhere: such a one goes anywhere else."""

    index: RoomIndex

    def candidates(self, ask: Ask) -> Iterable[str]:
        return () if ask.live.tried else sorted(self.index.on_trial)

    def scores(self, ask: Ask, options: Sequence[Option]) -> Sequence[float]:
        on_trial = self.index.on_trial
        if not on_trial:
            return ()
        wanted = not ask.live.tried and not ask.live.tokens_out
        return [-float((option.worker.id in on_trial) is not wanted) for option in options]


class ShortTail:
    """Seconds that the slow ones of a worker's stages take beyond what is expected of it, by its spans."""

    def scores(self, ask: Ask, options: Sequence[Option]) -> Sequence[float]:
        tokens = min(ask.live.request.max_tokens, ANSWER_TOKENS)
        return [
            -max(0.0, o.slot.tail_prefill - 1.0) * (o.slot.backlog_s + o.uncached * o.slot.token_s)
            - _GAP_SHARE * tokens * max(0.0, o.slot.tail_gap_s - o.slot.step_s)
            for o in options
        ]


def default_placement(index: RoomIndex, candidates: int, weights: PlacementWeights) -> Placement:
    """Untried workers first, then equal numerics, then the warm one, then the least cost."""
    few = max(1, candidates // 4)
    home, trial = Home(index), Trial(index)
    scorers: Sequence[tuple[float, Scorer]] = (
        (weights.untried, Untried()),
        (weights.numerics, SameNumerics()),
        (weights.home, home),
        (weights.trial, trial),
        (weights.ttft, FirstTokenSoon()),
        (weights.work, LittleWork()),
        (weights.disturbance, LittleDisturbance()),
        (weights.decode, FastDecode()),
        (weights.tail, ShortTail()),
        (weights.overlap, Overlap()),
        (weights.pressure, LowPressure()),
        (weights.spread, TenantSpread()),
    )
    return Placement(
        index=index,
        sources=(home, trial, Holders(index, few), LeastLoaded(index, few), Handful(index, few // 2)),
        last_resorts=(Roomiest(index, candidates), Handful(index, 4 * candidates)),
        filters=(HasRoom(),),
        scorers=[(weight, scorer) for weight, scorer in scorers if weight],
        picker=BestThenSpread(weights.tie_share, weights.tie_limit_s),
        most=candidates,
    )
