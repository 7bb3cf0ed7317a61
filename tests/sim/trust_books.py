"""Second tries: where they go, what they cost, who is blamed. Books of one leader's core, kept apart from its own."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from scheduler import events
from scheduler.commands import RequestOver, SendFailure, StartAttempt
from scheduler.requests import mark_of
from scheduler.state import State
from scheduler.workers import OUT, WorkerView

_WINDOW_S, _RESERVE, _SHARE = 10.0, 3, 0.1
_PAUSE_LATE_S = 2.0


class TrustBooks:
    """Follows one core. `fail` notes a violation; `refused` counts requests that were given up with good cause."""

    def __init__(self, state: State, fail: Callable[[str, str], None], refused: Counter[str]) -> None:
        self._state, self._fail, self._refused = state, fail, refused
        self._attempts: Counter[str] = Counter()
        """Of each request that is not over."""
        self._spent = 0
        self._tries: deque[float] = deque()
        """When second tries began within the last window."""
        self._deaths: Counter[str] = Counter()
        """Engines that ended under a request."""
        self._marks: dict[str, str] = {}
        """What each request asks for: a client that comes back may ask for the same under a new name."""
        self._guilty: set[str] = set()
        """Of these prompts an earlier leader has said it."""
        self._accepted = 0
        self._began: float | None = None
        self._out_since: dict[str, tuple[int, float]] = {}

    def before(self, event: events.Event, now: float) -> None:
        """An event is about to be handled."""
        self._began = now if self._began is None else self._began
        if isinstance(event, events.WorkerFrame):
            for failure in event.frame.failures:
                self._deaths[failure.request_id] += failure.code == "engine_lost"
        elif isinstance(event, events.Submitted):
            self._accepted += not event.request.resume
            self._marks[event.request.request_id] = mark_of(event.request)
        elif isinstance(event, events.JournalInherited):
            self._guilty.update(mark for mark, *_ in event.quarantined)

    def after(self, commands: list[Any], now: float) -> None:
        """It was handled."""
        self._budget(now)
        for command in commands:
            if isinstance(command, StartAttempt):
                self._attempts[command.request.request_id] += 1
                self._started(command, now)
            elif isinstance(command, SendFailure) and command.failure.code == "request_quarantined":
                self._blamed(command.failure.request_id)
            elif isinstance(command, SendFailure) and command.failure.code == "unavailable":
                self._gave_up(command.failure.request_id, now)
        for command in commands:
            if isinstance(command, RequestOver):
                self._attempts.pop(command.request_id, None)
        begun = {one.worker_id for one in commands if isinstance(one, StartAttempt)}
        for worker in self._state.workers.values():
            if worker.health.standing == OUT:
                self._put_out(worker, begun, now)
            else:
                self._out_since.pop(worker.id, None)

    def _started(self, command: StartAttempt, now: float) -> None:
        state = self._state
        live, worker = state.requests.get(command.request.request_id), state.workers[command.worker_id]
        if live is None or worker.id not in [one.worker_id for one in live.running]:
            return
        if live.hedge is not None and live.hedge.worker_id == worker.id and worker.id in live.tried:
            self._fail("second tries go elsewhere", f"{live.id} is hedged on {worker.id}, which it has tried")
        suspects = [one for one in worker.running if one in state.requests and state.requests[one].suspect]
        if live.suspect and len(suspects) > 1:
            self._fail("suspects share no worker", f"{sorted(suspects)} on {worker.id}")
        waited = now - live.waits_since
        if worker.id in live.avoid and waited < state.policy.avoid_s and not live.request.resume:
            others = [one.id for one in state.workers.values() if self._could(one, live)]
            if others:
                self._fail("second tries go elsewhere", f"{live.id} again on {worker.id}, not on {others}")

    @staticmethod
    def _could(worker: WorkerView, live: Any) -> bool:
        slot = worker.slot_for(live.key)
        return (
            worker.usable
            and worker.id not in live.avoid
            and worker.loaded(live.key)
            and slot is not None
            and slot.total_blocks >= live.blocks
        )

    def _blamed(self, request_id: str) -> None:
        mark = self._marks[request_id]
        most = max(self._deaths[one] for one, other in self._marks.items() if other == mark)
        if most < 2 and mark not in self._guilty:
            self._fail("innocents are not blamed", f"{request_id} after {most} deaths")

    def _gave_up(self, request_id: str, now: float) -> None:
        """It has had all tries that one request may have, or there was none left for anybody."""
        while self._tries and now - self._tries[0] >= _WINDOW_S:
            self._tries.popleft()
        if self._attempts[request_id] > self._state.policy.max_retries or len(self._tries) >= _RESERVE:
            self._refused[request_id.partition("~")[0]] += 1

    def _budget(self, now: float) -> None:
        spent = self._state.counters["retries"] + self._state.counters["hedges"]
        self._tries.extend([now] * (spent - self._spent))
        self._spent = spent
        windows = 1 + int((now - (self._began or now)) / _WINDOW_S)
        if spent > _SHARE * self._accepted + _RESERVE * windows:
            self._fail(
                "second tries keep to their budget", f"{spent} of {self._accepted} requests in {windows} windows"
            )

    def _put_out(self, worker: WorkerView, begun: set[str], now: float) -> None:
        """`begun`: who got work in this turn; one on trial could be given some until it got it."""
        health = worker.health
        turn, since = self._out_since.get(worker.id, (0, now))
        fresh = turn != health.turn
        since = now if fresh else since
        self._out_since[worker.id] = (health.turn, since)
        if not health.hung and now - since > health.pause_s + _PAUSE_LATE_S:
            self._fail("who is put out is tried again", f"{worker.id} after {now - since:.1f} s")
        others = [one for one in self._state.workers.values() if one.usable or one.id in begun]
        lonely = [slot.key for slot in worker.slots.values() if worker.loaded(slot.key)]
        if fresh and worker.connected and any(not any(one.loaded(key) for one in others) for key in lonely):
            self._fail("the last worker is never put out", worker.id)
