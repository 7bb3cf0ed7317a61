"""A gateway comes back with a request that still lives here: find out what it lacks and go on from there."""

from __future__ import annotations

from llmos.errors import Cancelled, Conflict
from llmos.internal.v1 import request_pb2, requests_pb2, work_pb2
from scheduler import charges
from scheduler.commands import AnswerTakeUp, Order, SendFailure
from scheduler.events import Submitted, TakeUpAsked
from scheduler.fairness import rank_of
from scheduler.lifecycle import (
    complete,
    drop_attempt,
    enqueue,
    failure,
    finish_exhausted,
    last_epoch,
    send,
    send_class,
)
from scheduler.requests import STOP, Choice, LiveRequest
from scheduler.state import Outbox, State


def asked(state: State, event: TakeUpAsked, now: float, out: Outbox) -> None:
    """A client has come back: tell its gateway what is remembered of its stream, and under which claim it goes on."""
    entry = state.journal.take_up(event.tenant, event.origin_ids, state.term, now)
    out.append(AnswerTakeUp(event.call, entry, state.settled))


def take_up(state: State, live: LiveRequest, event: Submitted, gateway_id: str, out: Outbox) -> None:
    """Bind a live request to the stream that it came on again and send what was lost between.

    A higher claim takes it from the gateway that has it. Raises Conflict if its present stream lives under the same one
    (then the id is used twice), Cancelled if a later claim has it.
    """
    stream_id = state.stream_of(live)
    if event.claim < live.claim:
        raise Cancelled("The stream was taken up elsewhere.")
    if event.claim == live.claim and stream_id is not None:
        raise Conflict("A request with this id is running.", param="request_id")
    if stream_id not in (None, event.stream_id):
        error = Cancelled("The stream was taken up elsewhere.")
        out.append(SendFailure(stream_id, failure(live.id, error, live.claim)))
    live.claim = event.claim
    state.journal.claimed(live.id, event.claim)
    _rebind(state, live, event.stream_id, gateway_id)
    if rank_of(event.request.priority) != live.rank:
        send_class(state, live, out)  # the gateway was away when the class changed
    resume = {entry.choice: entry for entry in event.request.resume}
    held = [resume.get(index, request_pb2.ChoiceResume(choice=index)) for index in range(len(live.choices))]
    if not all(_agrees(live, choice, said) for choice, said in zip(live.choices, held, strict=True)):
        _start_over(state, live, held, out)
        return
    for choice, said in zip(live.choices, held, strict=True):
        _catch_up(state, live, choice, said, out)
    if live.finished:
        complete(state, live, out)


def _rebind(state: State, live: LiveRequest, stream_id: int, gateway_id: str) -> None:
    old = state.by_stream.get(live.stream_id)
    if old is not None:
        old.discard(live.id)
    live.stream_id = stream_id
    live.gateway_id = gateway_id
    state.by_stream[stream_id].add(live.id)


def _agrees(live: LiveRequest, choice: Choice, said: request_pb2.ChoiceResume) -> bool:
    """The gateway holds a beginning of what this scheduler remembers, and all that it lacks is known."""
    if live.request.sampling.HasField("logprobs") and len(said.token_ids) < choice.logprobs_from:
        return False
    return choice.tokens[: len(said.token_ids)] == list(said.token_ids)


def _start_over(state: State, live: LiveRequest, held: list[request_pb2.ChoiceResume], out: Outbox) -> None:
    """The gateway is nearer to the client: what it holds is the truth, and a new attempt continues it."""
    state.counters["diverged"] += 1
    charged = [choice.charged for choice in live.choices]
    live.choices = [Choice.resumed(said) for said in held]
    for choice, before in zip(live.choices, charged, strict=True):
        choice.charged = max(choice.charged, before)
    if live.attempt is None:
        return
    drop_attempt(state, live, "diverged", out, tell=True)
    if not finish_exhausted(state, live, out):
        enqueue(state, live, out)


def _catch_up(state: State, live: LiveRequest, choice: Choice, said: request_pb2.ChoiceResume, out: Outbox) -> None:
    """Send what the gateway lacks of one choice; or learn that it had finished with it."""
    if said.finished:
        for attempt in () if choice.finished else live.running:
            order = requests_pb2.Finish(request_id=live.id, choice=said.choice, keep_until=len(said.token_ids))
            out.append(Order(attempt.worker_id, work_pb2.Command(finish=order)))
        charges.cut(live, choice, len(said.token_ids))
        choice.truncate(len(said.token_ids))
        choice.finished = True
        choice.finish_reason = said.finish_reason or choice.finish_reason or STOP
        return
    tokens, logprobs = choice.since(len(said.token_ids))
    if not tokens and not choice.finished:
        return
    missed = request_pb2.Output(
        request_id=live.id,
        epoch=last_epoch(state, live),
        choice=said.choice,
        index=len(said.token_ids),
        token_ids=tokens,
        logprobs=logprobs,
        finish_reason=choice.finish_reason,
    )
    send(state, live, missed, out)
