"""What gateways say: submit, take up again, cancel, finish a choice; and gateways that come and go."""

from __future__ import annotations

from llmos.errors import (
    Cancelled,
    InvalidRequest,
    LlmosError,
    ModelNotFound,
    PromptTooLong,
    UnsupportedFeature,
)
from llmos.internal.v1 import request_pb2, requests_pb2, work_pb2
from scheduler import charges, events, overload, suspects, takeover
from scheduler.commands import CloseStream, Order, SendCatalogue, SendFailure
from scheduler.journal import BREAKS
from scheduler.lifecycle import complete, discard, enqueue, fail, failure, finish_exhausted, forget_claim
from scheduler.requests import STOP, LiveRequest, ModelKey, blocks_needed, capabilities_for, most_tokens
from scheduler.state import GatewayView, Outbox, State
from scheduler.workers import HOPELESS


def connected(state: State, event: events.GatewayConnected, now: float, out: Outbox) -> None:
    """A gateway opened a stream; an older one of the same gateway is over."""
    gateway = state.gateways.get(event.node.id)
    if gateway is not None:
        out.append(CloseStream(gateway.stream_id))
        _stream_over(state, gateway.stream_id, now)
    state.gateways[event.node.id] = GatewayView(event.node, event.stream_id)
    state.by_stream[event.stream_id] = set()
    if state.settled:
        out.append(SendCatalogue(event.stream_id, state.catalogue.message()))


def lost(state: State, event: events.GatewayLost, now: float, out: Outbox) -> None:
    """A gateway's stream ended; its requests outlive it for a moment."""
    for gateway in state.gateways.values():
        if gateway.stream_id == event.stream_id:
            del state.gateways[gateway.node.id]
            _stream_over(state, event.stream_id, now)
            return


def _stream_over(state: State, stream_id: int, now: float) -> None:
    state.timers.at(now + state.policy.gateway_grace_s, events.GatewayGraceOver(stream_id))


def grace_over(state: State, event: events.GatewayGraceOver, now: float, out: Outbox) -> None:
    """Cancel what no stream has taken up again."""
    for request_id in sorted(state.by_stream.pop(event.stream_id, ())):
        discard(state, state.requests[request_id], "gateway_lost", out)


def submitted(state: State, event: events.Submitted, now: float, out: Outbox) -> None:
    """Accept a request, take it up again, or refuse it at once."""
    gateway_id = next((g.node.id for g in state.gateways.values() if g.stream_id == event.stream_id), None)
    if gateway_id is None:
        return
    request = event.request
    live = state.requests.get(request.request_id)
    try:
        _check_shape(request)
        if live is not None:
            takeover.take_up(state, live, event, gateway_id, out)
            return
        _check_life(state, event, now)
        suspects.check(state, request, now)
        _accept(state, event, gateway_id, now, out)
    except LlmosError as error:
        out.append(SendFailure(event.stream_id, failure(request.request_id, error, event.claim)))


def _check_life(state: State, event: events.Submitted, now: float) -> None:
    """What was cancelled must not start, nor what was stopped for a client to come back, unless that client has."""
    request_id, claim = event.request.request_id, event.claim
    if state.journal.is_over(request_id, claim):
        raise Cancelled("The stream is over here; it may have been taken up elsewhere.")
    reason = state.tombstones.get(request_id, now)
    # Not asked of the journal: the entry may have given way to others since.
    closed = state.closed.get(request_id, now)
    if reason is not None and (reason not in BREAKS or closed is None or claim <= closed):
        raise Cancelled("The request was cancelled.")


def _accept(state: State, event: events.Submitted, gateway_id: str, now: float, out: Outbox) -> None:
    request = event.request
    key = _resolve(state, request)
    if key is not None:
        _check_fit(state, request, key)
    parked_key = (request.model, request.model_version)
    live = LiveRequest.accept(request, gateway_id, event.stream_id, key or parked_key, now)
    live.adapter = _adapter(state, request)
    live.usage = state.quotas.enter(request, now)
    if not request.resume:
        try:
            overload.check(state, live, now, out, parked=key is None)
        except LlmosError:
            charges.ended(live)
            raise
    live.suspect = suspects.akin(state, request, now)
    live.claim = event.claim
    state.journal.begin(live, event.origin_id, event.sealed, event.claim)
    live.attempts = live.attempts_before = state.last_attempts.get(live.id, now) or 0
    home = state.workers.get(state.claims.get(live.id, ""))
    if request.resume and home is not None:
        live.fingerprint = home.fingerprint
    if not request.resume:
        state.budget.accepted()
    state.requests[live.id] = live
    state.by_stream[event.stream_id].add(live.id)
    if request.deadline_ms:
        state.timers.at(live.deadline_at, events.DeadlinePassed(live.id))
    if key is None:
        state.parked[live.id] = live
    elif not finish_exhausted(state, live, out):
        enqueue(state, live, out)


def _resolve(state: State, request: request_pb2.Request) -> ModelKey | None:
    """The exact version to run; None: not known yet, and it may still turn up."""
    model = state.catalogue.get(request.model)
    key = (request.model, request.model_version or (model.version if model is not None else ""))
    lacks_adapter = bool(request.adapter) and _adapter(state, request) is None
    if model is None or lacks_adapter or (key[1] != model.version and not _offered(state, key)):
        if state.settled and not request.resume and _anybody(state) and not _coming(state, request):
            asked = request.adapter or request.model
            raise ModelNotFound(f"The fleet does not serve a model '{asked}'.", param="model")
        return None
    if key[1] == model.version and request.tokenizer_hash != model.tokenizer_hash:
        raise InvalidRequest("The prompt was made with another tokenizer than the model's.", param="tokenizer_hash")
    return key


def _anybody(state: State) -> bool:
    """Some worker has reported to this leader. Until then what gateways ask for is what an earlier one has offered."""
    return any(worker.attachments for worker in state.workers.values())


def _coming(state: State, request: request_pb2.Request) -> bool:
    """Some worker may yet load what is asked for: one that starts as this leader's term does is not done with it."""
    name, version = request.model, request.model_version
    if request.adapter:
        name, version = request.adapter, request.adapter_version
    slots = [slot for worker in state.workers.values() if (slot := worker.slots.get(name)) is not None]
    return any(
        slot.state not in HOPELESS
        and version in ("", slot.key[1])
        and slot.base == (request.model if request.adapter else "")
        for slot in slots
    )


def _adapter(state: State, request: request_pb2.Request) -> ModelKey | None:
    """The exact version of the adapter to apply; None if there is none, or it is not known."""
    known = state.catalogue.get(request.adapter)
    if known is None or not request.adapter or known.base_model != request.model:
        return None
    key = (request.adapter, request.adapter_version or known.version)
    return key if key[1] == known.version or _offered(state, key) else None


def _offered(state: State, key: ModelKey) -> bool:
    slots = (worker.slot_for(key) for worker in state.workers.values() if worker.connected)
    return any(slot is not None and slot.state not in HOPELESS for slot in slots)


def _check_shape(request: request_pb2.Request) -> None:
    """The contract's bounds; gateways keep them, so that a breach is the sender's mistake."""
    if not request.request_id or not request.model or not request.token_ids:
        raise InvalidRequest("A request needs an id, a model and a prompt.", param="request")
    if request.choices < 1 or request.max_tokens < 1:
        raise InvalidRequest("A request needs at least one choice of at least one token.", param="max_tokens")
    seen = [resume.choice for resume in request.resume]
    if len(set(seen)) != len(seen) or any(choice >= request.choices for choice in seen):
        raise InvalidRequest("Each choice is resumed at most once and must exist.", param="resume")
    if any(len(resume.token_ids) > request.max_tokens for resume in request.resume):
        raise InvalidRequest("A choice cannot hold more tokens than it may get.", param="resume")


def _check_fit(state: State, request: request_pb2.Request, key: ModelKey) -> None:
    """Refuse at once what the model does not do, and what no worker could ever hold."""
    if request.choices > state.policy.max_choices:
        raise InvalidRequest(f"At most {state.policy.max_choices} choices.", param="n")
    model = state.catalogue.get(key[0])
    if model is not None and model.capabilities and capabilities_for(request).isdisjoint(model.capabilities):
        raise UnsupportedFeature(f"The model '{request.model}' does not do what is asked of it.", param="model")
    tokens = most_tokens(request)
    if model is not None and model.version == key[1] and tokens > model.context_length:
        raise PromptTooLong(
            f"Prompt and max_tokens make {tokens} tokens; the model's context is {model.context_length}.",
            param="max_tokens",
        )
    largest = state.largest_slot(key)
    if largest and blocks_needed(request, request.choices) > largest:
        raise PromptTooLong("No worker has memory for that many tokens; ask for fewer.", param="max_tokens")


def unpark(state: State, now: float, out: Outbox) -> None:
    """Look again at requests whose model was not known."""
    for live in list(state.parked.values()):
        try:
            key = _resolve(state, live.request)
            if key is not None:
                _check_fit(state, live.request, key)
        except LlmosError as error:
            fail(state, live, error, out)
            continue
        if key is not None:
            del state.parked[live.id]
            live.key, live.adapter = key, _adapter(state, live.request)
            if not finish_exhausted(state, live, out):
                enqueue(state, live, out)


def cancelled(state: State, event: events.Cancelled, now: float, out: Outbox) -> None:
    """Stop a request; a cancel that overtook its submission leaves a tombstone that stops it then.

    What a client cancels is over whoever reads it by now; a stream that just broke goes on where it was taken up."""
    live = state.requests.get(event.request_id)
    elsewhere = live is not None and live.stream_id != event.stream_id and state.stream_of(live) is not None
    if event.reason in BREAKS and (elsewhere or (live is not None and event.claim < live.claim)):
        state.counters["foreign_cancel"] += 1
        return
    if event.reason in BREAKS:
        if state.tombstones.get(event.request_id, now) in (None, *BREAKS):  # else it is over for good
            state.tombstones.put(event.request_id, event.reason, now)
            state.closed.put(event.request_id, max(event.claim, state.closed.get(event.request_id, now) or 0), now)
        state.journal.close(event.request_id, event.claim)
    else:
        state.tombstones.put(event.request_id, event.reason, now)
        state.journal.cancel(event.request_id)
    if live is None:
        forget_claim(state, event.request_id, out, tell=True)
    elif elsewhere:
        fail(state, live, Cancelled("The request was cancelled."), out)
    else:
        discard(state, live, event.reason or "cancelled", out)


def killed(state: State, event: events.Killed, now: float, out: Outbox) -> None:
    """A person ends a request; the client gets a typed error."""
    live = state.requests.get(event.request_id)
    state.tombstones.put(event.request_id, "killed", now)
    state.journal.cancel(event.request_id)
    if live is not None:
        fail(state, live, Cancelled("The request was cancelled by an operator."), out)
    else:
        forget_claim(state, event.request_id, out, tell=True)


def choice_finished(state: State, event: events.ChoiceFinished, now: float, out: Outbox) -> None:
    """The gateway found a stop string: tokens from `keep_until` on are neither delivered nor charged."""
    live = state.requests.get(event.request_id)
    if live is None or live.stream_id != event.stream_id or event.choice >= len(live.choices):
        return
    choice = live.choices[event.choice]
    if choice.finished:
        return
    choice.keep_until = event.keep_until
    state.journal.changed(live.id)
    charges.cut(live, choice, event.keep_until)
    if len(choice.tokens) >= event.keep_until:
        choice.truncate(event.keep_until)
        choice.finished = True
        choice.finish_reason = STOP
    for attempt in live.running:
        order = requests_pb2.Finish(request_id=live.id, choice=event.choice, keep_until=event.keep_until)
        out.append(Order(attempt.worker_id, work_pb2.Command(finish=order)))
    if live.finished:
        complete(state, live, out)
