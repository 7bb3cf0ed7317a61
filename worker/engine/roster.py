"""Which attempts wait and which run: by class, then arrival, within the blocks and the rows that there are."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterator

from worker.engine.batch import Batch
from worker.engine.blocks import BlockManager
from worker.engine.kv import BLOCK_TOKENS
from worker.engine.paged import KVMemory
from worker.engine.run import Run


class Roster:
    """Attempts of one model. Who runs out of blocks takes those of the attempt that comes last, which waits again.

    The attempt that comes first is never held up by another one, and one that is alone always fits: so somebody always
    gets on.
    """

    def __init__(self, manager: BlockManager, memory: KVMemory, max_running: int) -> None:
        self._manager = manager
        self._memory = memory
        self._max_running = max_running
        self._waiting: list[Run] = []
        self._running: dict[str, Run] = {}
        self.preemptions = 0

    def __bool__(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def running(self) -> list[Run]:
        """Those that run; who goes first comes first."""
        return sorted(self._running.values(), key=_order)

    @property
    def runs(self) -> list[Run]:
        """All, in no order."""
        return [*self._waiting, *self._running.values()]

    def find(self, request_id: str) -> Run | None:
        """The request's attempt, if there is one."""
        queued = (run for run in self._waiting if run.attempt.request_id == request_id)
        return self._running.get(request_id) or next(queued, None)

    def add(self, run: Run) -> None:
        """Let an attempt wait for its turn."""
        bisect.insort(self._waiting, run, key=_order)

    def forget(self, run: Run) -> None:
        """Take an attempt out and give its blocks back."""
        if self._running.pop(run.attempt.request_id, None) is None:
            self._waiting.remove(run)
        run.release()

    def set_priority(self, run: Run, priority: int) -> None:
        """Move an attempt to another class: from the next step on it waits, runs and gives way as one of that."""
        waits = run in self._waiting
        if waits:
            self._waiting.remove(run)
        run.set_priority(priority)
        if waits:
            self.add(run)

    def start(self) -> Iterator[Run]:
        """Let attempts run; the first that does not fit holds back those behind it."""
        while self._waiting and self._admits(self._waiting[0]):
            run = self._waiting.pop(0)
            run.start(self._manager, self._memory)
            self._running[run.attempt.request_id] = run
            yield run

    def make_room(self, batch: Batch) -> None:
        """Reserve the blocks that a step writes, at the cost of who comes last. Changes the batch."""
        for span in sorted(batch.spans, key=lambda span: span.run.order):
            if not self._runs(span.run) or not span.kv.lacks(span.end):
                continue
            if self._make_room(span.run, span.kv.lacks(span.end - len(span.draft))):
                if span.kv.lacks(span.end) > self._manager.free:
                    span.drop_draft()
                span.kv.reserve(span.end)
        batch.spans = [span for span in batch.spans if self._runs(span.run)]

    def _make_room(self, run: Run, blocks: int) -> bool:
        while self._runs(run) and blocks > self._manager.free:
            self._preempt(max(self._running.values(), key=_order))
        return self._runs(run)

    def _runs(self, run: Run) -> bool:
        return self._running.get(run.attempt.request_id) is run

    def _preempt(self, run: Run) -> None:
        del self._running[run.attempt.request_id]
        run.release()
        self.add(run)
        self.preemptions += 1

    def _admits(self, run: Run) -> bool:
        """Whether the run fits, perhaps in the place of some of a lower class, which are then preempted."""
        lower = [other for other in self.running if other.priority > run.priority]
        for count in range(len(lower) + 1):
            victims = lower[len(lower) - count :]
            if self._fits(run, victims):
                for victim in reversed(victims):
                    self._preempt(victim)
                return True
        return False

    def _fits(self, run: Run, without: Collection[Run]) -> bool:
        """Whether there is room beside the others, each of which is going to fill another block per choice."""
        others = [other for other in self._running.values() if other not in without]
        if not others:
            return True
        rows = sum(len(other.choices) for other in others) + len(run.choices)
        promised = sum(other.blocks_at(BLOCK_TOKENS) - other.held for other in others)
        needed = run.blocks_at(BLOCK_TOKENS) - self._manager.held(run.known_prompt)
        free = self._manager.free + sum(victim.held for victim in without)
        return rows <= self._max_running and needed + promised <= free


def _order(run: Run) -> tuple[int, int]:
    return run.order
