"""Queries of death: requests that kill the engine which computes them. Found, kept apart, not run a third time.

An engine that ends makes suspects of all that ran on it. (A worker that is lost as a whole does not: what a request can
kill is the engine's process, and links and hosts fail for many reasons.) What may be to blame for an end are its
*candidates*: suspects, what is the same as a suspect, and what had only just begun there. With two or more of them
nobody is blamed; they go on as suspects. A suspect runs beside none of those, and nothing new is put beside it, so that
the next end has one candidate: the one who has died twice is it, if it got no further than the time before. Innocents
go on, each where it was. A suspect that gets a few tokens beyond the point at which its engine died is none any more.

What is found out is kept per tenant for a while: the same prompt for the same model is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmos.errors import Quarantined
from llmos.internal.v1 import request_pb2
from scheduler.lifecycle import fail, stand_in
from scheduler.requests import LiveRequest, mark_of
from scheduler.state import Outbox, State
from scheduler.workers import WorkerView

DEATHS = 2
"""Engines that end under a request before it is to blame."""


def engine_lost(state: State, worker: WorkerView, lost: Sequence[LiveRequest], out: Outbox) -> None:
    """The engine below the attempts of these requests has ended: all that ran on it. Ends those that are to blame."""
    candidates = [live for live in lost if _may_be_it(state, live)]
    if len({live.mark for live in candidates}) == 1:
        blamed = [live for live in candidates if _to_blame(state, worker, live, alone=len(candidates) == len(lost))]
        if blamed:
            _condemn(state, blamed[0], out)
            return
    for live in lost:
        live.deaths = max(1, live.deaths)
        live.died_on.add(worker.id)
        live.avoid.add(worker.id)
        live.suspect = True
        _watch_beside(state, worker, live, out)
        state.suspected.put(live.mark, live.id, state.now)
        state.counters["suspected"] += 1


def _watch_beside(state: State, worker: WorkerView, live: LiveRequest, out: Outbox) -> None:
    """Its other attempt, if it has two, is a suspect's now. It ends if anything may be to blame beside it."""
    for other in live.running:
        place = state.workers[other.worker_id]
        if place is worker:
            continue
        other.exposed = True
        beside = [state.requests[request_id] for request_id in place.running if request_id != live.id]
        if place.suspect or any(_may_be_it(state, one) for one in beside):
            stand_in(state, live, other, "suspect", out, tell=True)
        else:
            place.suspect = live.id


def _may_be_it(state: State, live: LiveRequest) -> bool:
    begun = live.attempt is not None and not live.attempt.settled
    return live.suspect or begun or state.suspected.get(live.mark, state.now) is not None


def _to_blame(state: State, worker: WorkerView, live: LiveRequest, *, alone: bool) -> bool:
    """The only candidate has died once more, where it died before.

    Twice on one worker may be that worker's doing: it counts once where there is another one to try. Who got further
    this time did not die of what it is: of those that ran beside it one may have. And the end of an attempt that ran
    already at the first death proves nothing further: something outside may have ended both engines at once.
    """
    attempt = worker.running.get(live.id)
    if attempt is not None and attempt.exposed:
        return False
    if worker.id not in live.died_on or not _another(state, worker, live):
        live.deaths += 1
    return live.deaths >= DEATHS and (alone or not (live.attempt and live.attempt.produced))


def _another(state: State, worker: WorkerView, live: LiveRequest) -> bool:
    others = (one for one in state.workers.values() if one is not worker and one.usable)
    return any(one.loaded(live.key) and one.id not in live.died_on for one in others)


def _condemn(state: State, live: LiveRequest, out: Outbox) -> None:
    """End it, and those that are the same wherever they run, and refuse it from now on."""
    state.quarantine.put(live.mark, live.id, state.now)
    state.counters["quarantined"] += 1
    if state.journal.followed:
        state.condemned.append(live.mark)
    for same in [one for one in state.requests.values() if _same(one.request, live.request)]:
        fail(state, same, _error(state), out)


def _same(one: request_pb2.Request, other: request_pb2.Request) -> bool:
    """What their marks tell, without computing it of everybody."""
    return (
        len(one.token_ids) == len(other.token_ids)
        and (one.tenant, one.model, one.adapter) == (other.tenant, other.model, other.adapter)
        and one.token_ids == other.token_ids
    )


def akin(state: State, request: request_pb2.Request, now: float) -> bool:
    """Whether the same prompt ran when an engine ended: under a new name it is a suspect, too."""
    return bool(len(state.suspected)) and state.suspected.get(mark_of(request), now) is not None


def check(state: State, request: request_pb2.Request, now: float) -> None:
    """Raise Quarantined for what workers have died of."""
    if len(state.quarantine) and state.quarantine.get(mark_of(request), now) is not None:
        state.counters["quarantine_refused"] += 1
        raise _error(state)


def look(state: State, worker: WorkerView) -> None:
    """A frame came: clear the suspect that runs there, if it has got far enough."""
    attempt = worker.running.get(worker.suspect)
    if attempt is not None and attempt.settled:
        live = state.requests[worker.suspect]
        live.suspect, live.deaths = False, 0
        live.died_on.clear()
        state.suspected.drop(live.mark)
        worker.suspect = ""
        state.looking.update(slot.key for slot in worker.slots.values())


def _error(state: State) -> Quarantined:
    minutes = max(1, round(state.policy.quarantine_s / 60))
    return Quarantined(
        f"{DEATHS} workers died while they computed this prompt. It is not run for {minutes} minutes: "
        "change the prompt, and tell your operator the request's id."
    )
