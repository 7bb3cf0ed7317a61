"""What workers send each step: the hot path. Checks epoch and index, remembers tokens, passes output on."""

from __future__ import annotations

from collections.abc import Sequence

from llmos.errors import AttemptLost, ClientError, EngineLost, from_code
from llmos.internal.v1 import request_pb2, work_pb2
from scheduler import charges, decay, health, hedging, learning, members, stalls, suspects
from scheduler.commands import FirstToken, Order
from scheduler.events import WorkerFrame
from scheduler.lifecycle import complete, migrate, retry, send
from scheduler.requests import Attempt, Choice, LiveRequest
from scheduler.state import Outbox, State
from scheduler.workers import WorkerView


def received(state: State, event: WorkerFrame, now: float, out: Outbox) -> None:
    """Take in one frame of a worker."""
    worker = state.workers.get(event.worker_id)
    if worker is None or not worker.connected:
        return
    frame = event.frame
    if frame.outputs:
        learning.stepped(state, worker, frame, now, out)
        _sample_gap(state, frame, now)
    worker.still = frame.busy and frame.step == worker.step
    if not worker.still:
        worker.step_at = now
        if worker.health.hung:
            health.on_trial(state, worker)
    worker.step, worker.busy = frame.step, frame.busy
    if frame.fenced:
        state.counters["fenced"] += frame.fenced
    if frame.draining != worker.draining:
        members.heard_draining(state, worker, frame.draining)
    if frame.cache:
        learning.cache_changed(state, worker, frame.cache, out)
    if frame.models:
        members.models_changed(state, worker, frame.models, now, out)
    for output in frame.outputs:
        _output(state, worker, output, now, out)
    if frame.failures:
        _all_failed(state, worker, frame.failures, now, out)
    if worker.suspect:
        suspects.look(state, worker)
    if worker.health.probe:
        health.look_at_probe(state, worker, now)
    if frame.uses:
        decay.heard(state, worker, frame.uses, now, out)
    if frame.busy:
        worker.busy_at = now
    elif worker.running:
        _missed(state, worker, now, out)
    if worker.still and not worker.running:
        stalls.lingers(state, worker, now)
    if state.kept_apart:  # what runs there may have got far enough for a suspect to come beside it
        state.looking |= state.kept_apart
        state.kept_apart.clear()


def _missed(state: State, worker: WorkerView, now: float, out: Outbox) -> None:
    """A worker that says for long that it runs nothing has lost what it was given, or the last words of it: a gap in
    the output would show, but nothing follows them."""
    for request_id, attempt in list(worker.running.items()):
        if now - max(worker.busy_at, attempt.begun_at) >= state.policy.lost_attempt_s:
            state.counters["lost_attempts"] += 1
            error = AttemptLost("the worker does not run it any more")
            health.struck(state, worker, error.message, now)
            retry(state, state.requests[request_id], attempt, error, now, out, tell=True)


def _sample_gap(state: State, frame: work_pb2.WorkFrame, now: float) -> None:
    """One output of a frame, each in its turn, stands for all of them: no measurement per token."""
    output = frame.outputs[frame.sequence % len(frame.outputs)]
    live = state.requests.get(output.request_id)
    if live is not None:
        state.meters.gap(live, now, len(frame.outputs))


def _current(
    state: State, worker: WorkerView, request_id: str, epoch: request_pb2.Epoch
) -> tuple[LiveRequest, Attempt] | None:
    """The running attempt that this is of, and its request; None for anything older, which is counted."""
    attempt = worker.running.get(request_id)
    if attempt is not None and attempt.number == epoch.attempt and attempt.term == epoch.term:
        return state.requests[request_id], attempt
    state.counters["stale_outputs"] += 1
    return None


def _output(state: State, worker: WorkerView, output: request_pb2.Output, now: float, out: Outbox) -> None:
    found = _current(state, worker, output.request_id, output.epoch)
    if found is None:
        _stop_unwanted(worker, output, out)
        return
    live, attempt = found
    worker.reflected(attempt)
    fault = _fault(live, output)
    if fault:
        state.counters["broken_attempts"] += 1
        health.struck(state, worker, fault, now)
        retry(state, live, attempt, AttemptLost(fault), now, out, tell=True)
        return
    choice = live.choices[output.choice]
    if choice.finished or output.index < len(choice.tokens):
        state.counters["repeated_outputs"] += 1
        return
    if live.hedge is not None:
        hedging.commit(state, live, attempt, now, out)
    if _take(state, worker, live, attempt, output, now, out) and live.finished:
        complete(state, live, out)


def _stop_unwanted(worker: WorkerView, output: request_pb2.Output, out: Outbox) -> None:
    """Most often the order to stop is on its way; where it was lost with a stream, this one ends the attempt. What a
    gateway may yet ask for goes on."""
    if output.request_id not in worker.unclaimed and not output.finish_reason:
        cancel = work_pb2.CancelAttempt(request_id=output.request_id, epoch=output.epoch)
        out.append(Order(worker.id, work_pb2.Command(cancel=cancel)))


def _fault(live: LiveRequest, output: request_pb2.Output) -> str:
    """Why this output breaks the contract; empty if it does not."""
    if output.choice >= len(live.choices):
        return "output for a choice that does not exist"
    have = len(live.choices[output.choice].tokens)
    if output.index > have:
        return "gap in the output"
    if output.index == have and have + len(output.token_ids) > live.request.max_tokens:
        return "more tokens than asked for"
    if output.logprobs and len(output.logprobs) != len(output.token_ids):
        return "log-probabilities do not match the tokens"
    return ""


def _take(
    state: State,
    worker: WorkerView,
    live: LiveRequest,
    attempt: Attempt,
    output: request_pb2.Output,
    now: float,
    out: Outbox,
) -> bool:
    """Remember the next tokens of a choice and pass them on; whether that was its end."""
    choice = live.choices[output.choice]
    if not attempt.started:
        learning.first_output(state, worker, live, attempt, output, now)
    tokens = output.token_ids
    if tokens:
        if attempt.produced == 0:
            _begins(state, worker, live, attempt, now, out)
        attempt.produced += len(tokens)
        worker.tokens += len(tokens)
        live.output_at = now
        if live.cell is not None:
            live.cell.produced += len(tokens)
    if choice.keep_until is not None:
        output = _cut(choice, output)
    choice.append(output.token_ids, output.logprobs)
    state.journal.grown(live.id)
    charges.produced(live, choice)
    if output.cached_tokens:
        _found_cached(live, output)
        charges.cached(live, output.cached_tokens, state.policy.cached_cost)
    if output.finish_reason:
        choice.finish_reason = output.finish_reason
        choice.finished = True
    send(state, live, output, out)
    return choice.finished


def _found_cached(live: LiveRequest, output: request_pb2.Output) -> None:
    """Of the first attempt, or its hedge, alone: later ones find what was computed for it before."""
    if live.attempt is not None and live.attempt.first and not live.request.resume:
        live.cached_tokens = max(live.cached_tokens, output.cached_tokens)


def _begins(state: State, worker: WorkerView, live: LiveRequest, attempt: Attempt, now: float, out: Outbox) -> None:
    """An attempt's first tokens."""
    out.append(FirstToken(live.id, attempt.number, attempt.won))
    attempt.first_at = now
    state.waiting.queue(live.key).forecast.first.seen.add(now - attempt.begun_at)
    live.fingerprint = live.fingerprint or worker.fingerprint
    if not live.output_at and not live.request.resume:
        state.meters.first_token(live, now)


def _cut(choice: Choice, output: request_pb2.Output) -> request_pb2.Output:
    """Leave out tokens that the gateway does not want; the choice ends when it has what is wanted."""
    assert choice.keep_until is not None
    room = max(0, choice.keep_until - len(choice.tokens))
    if len(output.token_ids) >= room:
        choice.finished = True
    if len(output.token_ids) <= room:
        return output
    kept = request_pb2.Output()
    kept.CopyFrom(output)
    del kept.token_ids[room:]
    del kept.logprobs[room:]
    return kept


def _all_failed(
    state: State, worker: WorkerView, failures: Sequence[request_pb2.Failure], now: float, out: Outbox
) -> None:
    """Attempts failed by the worker's own word. A lost engine is the worker's doing: what ran there moves on."""
    lost: dict[str, tuple[LiveRequest, Attempt]] = {}
    """By request: one that is named twice has died once."""
    reason = ""
    for failure in failures:
        found = _current(state, worker, failure.request_id, failure.epoch)
        if found is None:
            continue
        if failure.code == EngineLost.code:
            lost[failure.request_id] = found
            reason = failure.message
        else:
            _failed(state, worker, *found, failure, now, out)
    if not lost:
        return
    health.struck(state, worker, reason, now)
    suspects.engine_lost(state, worker, [live for live, _ in lost.values()], out)
    for live, attempt in lost.values():
        if live.id in state.requests:
            migrate(state, live, attempt, EngineLost.code, out, tell=False)


def _failed(
    state: State,
    worker: WorkerView,
    live: LiveRequest,
    attempt: Attempt,
    failure: request_pb2.Failure,
    now: float,
    out: Outbox,
) -> None:
    error = from_code(failure.code, failure.message, param=failure.param or None)
    if isinstance(error, AttemptLost):
        migrate(state, live, attempt, error.code, out, tell=False)
    else:
        if not isinstance(error, ClientError):
            health.struck(state, worker, error.code, now)
        retry(state, live, attempt, error, now, out, tell=False)
