"""How requests change hands and end: queue, give up an attempt, retry, migrate, fail, finish.

Every accepted request ends exactly once, in `_remove`; everything that ends one goes through it.
"""

from __future__ import annotations

from llmos.errors import ClientError, DeadlineExceeded, FleetError, LlmosError, Unavailable
from llmos.internal.v1 import request_pb2, requests_pb2, work_pb2
from llmos.v1 import inference_pb2
from scheduler import charges, health
from scheduler.commands import AttemptOver, Order, Queued, RequestOver, SendClass, SendFailure, SendOutput
from scheduler.events import RetryDue
from scheduler.fairness import CLASSES
from scheduler.requests import LENGTH, Attempt, LiveRequest
from scheduler.state import Outbox, State


def enqueue(state: State, live: LiveRequest, out: Outbox) -> None:
    """Begin to wait for a worker; the next look at its model may place it at once."""
    if live.cell is None:
        state.meters.enter(live, state.now)
    wait(state, live)
    out.append(Queued(live.request))


def wait(state: State, live: LiveRequest) -> None:
    """Enter the queue, and see to it that a request that may be placed now is looked at."""
    state.waiting.push(live, state.now)
    state.book.arrived(live.key[0])
    if state.waiting.short(live.key):
        state.looking.add(live.key)
        state.leading.discard(live.key)
    elif live.key not in state.looking and state.waiting.leads(live):
        state.looking.add(live.key)
        state.leading.add(live.key)


def send(state: State, live: LiveRequest, output: request_pb2.Output, out: Outbox) -> None:
    """Pass output on. While the gateway is away nothing is sent: it will say what it has when it returns."""
    stream_id = state.stream_of(live)
    if stream_id is not None:
        out.append(SendOutput(stream_id, output))


def send_class(state: State, live: LiveRequest, out: Outbox) -> None:
    """Tell the gateway what class the request is in now: a later leader hears of it from the gateway alone."""
    stream_id = state.stream_of(live)
    if stream_id is not None:
        change = requests_pb2.ClassChange(request_id=live.id, priority=CLASSES[live.rank])
        out.append(SendClass(stream_id, change))


def send_finish(
    state: State, live: LiveRequest, choice: int, reason: inference_pb2.FinishReason.ValueType, out: Outbox
) -> None:
    """Tell the gateway that a choice has ended without a further token."""
    output = request_pb2.Output(
        request_id=live.id,
        epoch=last_epoch(state, live),
        choice=choice,
        index=len(live.choices[choice].tokens),
        finish_reason=reason,
    )
    send(state, live, output, out)


def last_epoch(state: State, live: LiveRequest) -> request_pb2.Epoch:
    """The epoch of the running attempt, or of the last one. Attempts are numbered on across terms of one leader."""
    if live.attempt is not None:
        return live.attempt.epoch
    return request_pb2.Epoch(term=state.term, attempt=live.attempts)


def drop_attempt(state: State, live: LiveRequest, error: str, out: Outbox, *, tell: bool) -> None:
    """The running attempt, if any, is over, and so is its hedge; `tell`: its worker does not know yet."""
    attempt = live.attempt
    if attempt is None:
        return
    if live.hedge is not None:
        stand_in(state, live, live.hedge, error, out, tell=True)
    live.attempt = None
    charges.stopped(live)
    end_attempt(state, live, attempt, error, out, tell=tell)


def stand_in(state: State, live: LiveRequest, attempt: Attempt, error: str, out: Outbox, *, tell: bool) -> bool:
    """One of two attempts is over before either had output: the other one goes on alone. False: there is no other."""
    if live.hedge is None:
        return False
    hedge, live.hedge = live.hedge, None
    del state.hedged[live.id]
    if attempt is hedge:
        state.counters["hedges_dropped"] += 1
    else:
        state.counters["hedges_stood_in"] += 1
        live.attempt = hedge
    live.tried.add(attempt.worker_id)
    end_attempt(state, live, attempt, error, out, tell=tell)
    return True


def end_attempt(
    state: State,
    live: LiveRequest,
    attempt: Attempt,
    error: str,
    out: Outbox,
    *,
    tell: bool,
    lost: bool = False,
    at_least: bool = False,
) -> None:
    """Give back what an attempt holds on its worker. It is none of its request's any more."""
    worker = state.workers.get(attempt.worker_id)
    if worker is not None and live.id in worker.running:
        worker.release(live.id)
        health.over(state, worker, live.id)
        if worker.suspect == live.id:
            worker.suspect = ""
            state.looking.update(slot.key for slot in worker.slots.values())
        state.prefixes.settle(worker.id, attempt.model, attempt.expected)
        state.room_changed(worker, worker.slots[attempt.model])
        if tell and worker.connected:
            cancel = work_pb2.CancelAttempt(request_id=live.id, epoch=attempt.epoch)
            out.append(Order(worker.id, work_pb2.Command(cancel=cancel)))
    out.append(AttemptOver(live.id, attempt.number, error, attempt.produced, lost, at_least))


def forget_claim(state: State, request_id: str, out: Outbox, *, tell: bool) -> None:
    """Nobody goes on with what a worker reported to run; `tell`: cancel it there."""
    worker = state.workers.get(state.claims.pop(request_id, ""))
    epoch = worker.unclaimed.pop(request_id, None) if worker is not None else None
    if tell and worker is not None and epoch is not None and worker.connected:
        cancel = work_pb2.CancelAttempt(request_id=request_id, epoch=epoch)
        out.append(Order(worker.id, work_pb2.Command(cancel=cancel)))


def migrate(state: State, live: LiveRequest, attempt: Attempt, reason: str, out: Outbox, *, tell: bool) -> None:
    """The attempt is lost through no fault of the request: go on elsewhere, at once, without limit but a sane one."""
    if stand_in(state, live, attempt, reason, out, tell=tell):
        return
    live.tried.add(attempt.worker_id)
    drop_attempt(state, live, reason, out, tell=tell)
    if finish_exhausted(state, live, out):
        return
    if live.attempts - live.attempts_before >= state.policy.max_attempts:
        fail(state, live, Unavailable("The request was moved between workers too often; try again."), out)
        return
    enqueue(state, live, out)


def retry(
    state: State, live: LiveRequest, attempt: Attempt, error: LlmosError, now: float, out: Outbox, *, tell: bool
) -> None:
    """The attempt failed: try again after a pause, a few times, if that can help. Only what is wrong with the request
    itself ends its other attempt, too."""
    if not isinstance(error, ClientError) and stand_in(state, live, attempt, error.code, out, tell=tell):
        return
    if live.retries >= state.policy.max_retries or not error.retryable:
        drop_attempt(state, live, error.code, out, tell=tell)
        fail(state, live, public(error), out)
        return
    live.tried.add(attempt.worker_id)
    drop_attempt(state, live, error.code, out, tell=tell)
    if finish_exhausted(state, live, out):
        return
    pause = state.policy.retry_base_s * 2**live.retries
    live.retries += 1
    if pay(state, live, now, out):
        state.timers.at(now + pause, RetryDue(live.id))


def pay(state: State, live: LiveRequest, now: float, out: Outbox) -> bool:
    """Whether a retry is within the budget. If not, a stream that has begun waits until one is, the alternative being
    to break it; a request without output is told when to come back."""
    if state.budget.take(now):
        live.owes_retry = False
        state.counters["retries"] += 1
        return True
    wait = state.budget.wait_s(now)
    state.counters["retries_refused"] += 1
    if live.tokens_out:
        live.owes_retry = True
        state.timers.at(now + wait, RetryDue(live.id))
    else:
        error = "Its worker failed, and others of late: there are no further tries left for now. Try again later."
        fail(state, live, Unavailable(error, retry_after_s=wait), out)
    return False


def public(error: LlmosError) -> LlmosError:
    """What a client may see of an error between services."""
    if isinstance(error, FleetError):
        return Unavailable("No worker could finish the request; try again.")
    return error


def finish_exhausted(state: State, live: LiveRequest, out: Outbox) -> bool:
    """End choices that lack nothing but their finish reason; whether that ended the request."""
    for choice in live.end_exhausted():
        state.journal.grown(live.id)
        send_finish(state, live, choice, LENGTH, out)
    if live.finished:
        complete(state, live, out)
        return True
    return False


def complete(state: State, live: LiveRequest, out: Outbox) -> None:
    """Every choice has ended and its output is on its way."""
    charges.learned(state.waiting.queue(live.key).forecast, live, state.now)
    worker = state.workers.get(live.attempt.worker_id) if live.attempt is not None else None
    if worker is not None:
        health.completed(state, worker, live.id)
    if live.suspect and live.attempt is not None and live.attempt.started:
        live.suspect = False
        state.suspected.drop(live.mark)
    drop_attempt(state, live, "", out, tell=False)
    _remove(state, live, "", out)


def fail(state: State, live: LiveRequest, error: LlmosError, out: Outbox) -> None:
    """End a request with a typed error; a running attempt is cancelled."""
    epoch = last_epoch(state, live) if live.attempts else None
    drop_attempt(state, live, error.code, out, tell=True)
    stream_id = state.stream_of(live)
    if stream_id is not None:
        out.append(SendFailure(stream_id, failure(live.id, error, live.claim, epoch)))
    _remove(state, live, error.code, out)


def discard(state: State, live: LiveRequest, reason: str, out: Outbox) -> None:
    """End a request that nobody listens to any more."""
    drop_attempt(state, live, reason, out, tell=True)
    _remove(state, live, reason, out)


def expire(state: State, live: LiveRequest, out: Outbox) -> None:
    """The client's deadline has passed."""
    fail(state, live, DeadlineExceeded("The request's deadline passed before it was finished."), out)


def failure(
    request_id: str, error: LlmosError, claim: int, epoch: request_pb2.Epoch | None = None
) -> request_pb2.Failure:
    """An error as the gateway gets it, for the stream under this claim."""
    return request_pb2.Failure(
        request_id=request_id,
        epoch=epoch,
        code=error.code,
        message=error.message,
        param=error.param or "",
        retry_after_ms=int((error.retry_after_s or 0) * 1000),
        claim=claim,
    )


def _remove(state: State, live: LiveRequest, error: str, out: Outbox) -> None:
    state.waiting.discard(live)
    state.parked.pop(live.id, None)
    forget_claim(state, live.id, out, tell=True)
    del state.requests[live.id]
    charges.ended(live)
    state.journal.end(live, error, state.now)
    state.meters.leave(live)
    state.book.departures[live.key[0]] += 1
    if live.attempts:
        state.last_attempts.put(live.id, live.attempts, state.now)
    siblings = state.by_stream.get(live.stream_id)
    if siblings is not None:
        siblings.discard(live.id)
    out.append(RequestOver(live.id, error))
