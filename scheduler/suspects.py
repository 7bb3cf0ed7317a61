"""Queries of death: requests that kill the engine which computes them. Found, kept apart, not run a third time.

An engine that ends makes suspects of all that ran on it. (A worker that is lost as a whole does not: what a request can
kill is the engine's process, and links and hosts fail for many reasons.) No worker is given two suspects at once, so
that the next death has one suspect at most: the one who has died twice is it. Those beside it are suspects in their
turn; innocents go on, each where it was. A suspect that gets a few tokens beyond the point at which its engine died is
none any more.

What is found out is kept per tenant for a while: the same prompt for the same model is refused.
"""

from __future__ import annotations

import hashlib
import struct

from llmos.errors import Quarantined
from llmos.internal.v1 import request_pb2
from scheduler import health
from scheduler.lifecycle import fail
from scheduler.requests import LiveRequest
from scheduler.state import Outbox, State
from scheduler.workers import WorkerView

DEATHS = 2
"""Engines that end under a request before it is to blame."""
CLEAR_TOKENS = 8
"""Output of an attempt after which its request is no suspect."""


def engine_lost(state: State, worker: WorkerView, live: LiveRequest, out: Outbox) -> bool:
    """The engine below its attempt has ended; whether that was the end of the request, too.

    Twice on one worker may be that worker's doing: it counts once where there is another one to try.
    """
    if worker.id not in live.died_on or not health.spare(state, worker):
        live.deaths += 1
    live.died_on.add(worker.id)
    live.avoid.add(worker.id)
    live.suspect = True
    state.suspected.put(fingerprint(live.request), live.id, state.now)
    state.counters["suspected"] += 1
    return live.deaths >= DEATHS and _condemn(state, live, out)


def _condemn(state: State, live: LiveRequest, out: Outbox) -> bool:
    """End it, and those that are the same, and refuse it from now on."""
    mark = fingerprint(live.request)
    state.quarantine.put(mark, live.id, state.now)
    state.counters["quarantined"] += 1
    for same in [one for one in state.requests.values() if one.suspect and fingerprint(one.request) == mark]:
        fail(state, same, _error(state), out)
    return True


def akin(state: State, request: request_pb2.Request, now: float) -> bool:
    """Whether the same prompt ran when an engine ended: under a new name it is a suspect, too."""
    return bool(len(state.suspected)) and state.suspected.get(fingerprint(request), now) is not None


def check(state: State, request: request_pb2.Request, now: float) -> None:
    """Raise Quarantined for what workers have died of."""
    if len(state.quarantine) and state.quarantine.get(fingerprint(request), now) is not None:
        state.counters["quarantine_refused"] += 1
        raise _error(state)


def fingerprint(request: request_pb2.Request) -> str:
    """What makes two requests the same: tenant, model, adapter and prompt."""
    tokens = struct.pack(f"<{len(request.token_ids)}I", *request.token_ids)
    names = "\0".join((request.tenant, request.model, request.adapter)).encode()
    return hashlib.blake2b(names + b"\0" + tokens, digest_size=16).hexdigest()


def look(state: State, worker: WorkerView) -> None:
    """A frame came: clear the suspect that runs there, if it has got far enough."""
    attempt = worker.running.get(worker.suspect)
    if attempt is not None and attempt.produced >= CLEAR_TOKENS * attempt.sequences:
        live = state.requests[worker.suspect]
        live.suspect, live.deaths = False, 0
        live.died_on.clear()
        worker.suspect = ""
        state.looking.update(slot.key for slot in worker.slots.values())


def _error(state: State) -> Quarantined:
    minutes = max(1, round(state.policy.quarantine_s / 60))
    return Quarantined(
        f"{DEATHS} workers died while they computed this prompt. It is not run for {minutes} minutes: "
        "change the prompt, and tell your operator the request's id."
    )
