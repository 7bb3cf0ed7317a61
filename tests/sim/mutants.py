"""Seeded bugs: each is a plausible slip in one place, planted at run time. A harness that finds none proves nothing."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Any

from gateway import outbox as gateway_outbox
from gateway import session, transcript
from llmos.etcd import lease
from scheduler import (
    admission,
    budget,
    charges,
    events,
    frames,
    health,
    leadership,
    lifecycle,
    members,
    outflow,
    recent,
    seat,
    suspects,
    takeover,
    trust,
    workers,
)
from scheduler import requests as live_requests
from tests.sim import hedge_mutants, journal_mutants
from tests.sim.planting import MUTANTS, Mutant, handler, mutant, nothing, planted, put
from worker import core as worker_core

__all__ = ["MUTANTS", "Mutant", "hedge_mutants", "journal_mutants", "planted"]

# The scheduler


@mutant("output of any attempt is taken, whatever its epoch")
def _epoch_fence_dropped(stack: ExitStack) -> None:
    def current(state: Any, worker: Any, request_id: str, epoch: Any) -> Any:
        live = state.requests.get(request_id)
        return (live, live.attempt) if live is not None and live.attempt is not None else None

    put(stack, frames, "_current", current)


@mutant("output that leaves a gap is taken")
def _gap_accepted(stack: ExitStack) -> None:
    put(stack, frames, "_fault", lambda live, output: "")


@mutant("a request whose worker is lost is not queued again")
def _requeue_lost(stack: ExitStack) -> None:
    def migrate(state: Any, live: Any, attempt: Any, reason: str, out: Any, *, tell: bool) -> None:
        lifecycle.drop_attempt(state, live, reason, out, tell=tell)

    put(stack, members, "migrate", migrate)


@mutant("a cancel leaves no tombstone")
def _tombstone_forgotten(stack: ExitStack) -> None:
    real = recent.Recent.put

    def remember(self: Any, key: str, value: Any, now: float) -> None:
        if not isinstance(value, str):
            real(self, key, value, now)

    put(stack, recent.Recent, "put", remember)


@mutant("a cancel frees the request but forgets to stop its worker")
def _cancel_not_passed_on(stack: ExitStack) -> None:
    real = lifecycle.drop_attempt

    def drop(state: Any, live: Any, error: str, out: Any, *, tell: bool) -> None:
        real(state, live, error, out, tell=False)

    put(stack, lifecycle, "drop_attempt", drop)
    put(stack, frames, "_stop_unwanted", nothing)


@mutant("the end of a request is told twice")
def _double_end(stack: ExitStack) -> None:
    real = lifecycle._remove

    def remove(state: Any, live: Any, error: str, out: Any) -> None:
        real(state, live, error, out)
        if live.retries or len(live.tried):
            out.append(lifecycle.RequestOver(live.id, error))

    put(stack, lifecycle, "_remove", remove)


@mutant("blocks are promised that are not there")
def _blocks_exceeded(stack: ExitStack) -> None:
    put(stack, workers.ModelSlot, "fits", lambda self, blocks, credit: self.total_blocks >= blocks)


@mutant("blocks of an attempt that is over are never given back")
def _blocks_leaked(stack: ExitStack) -> None:
    real = workers.WorkerView.release

    def release(self: Any, request_id: str) -> None:
        attempt = self.running[request_id]
        kept = attempt.blocks if attempt.number > 1 else 0
        real(self, request_id)
        self.slots[attempt.model].held += kept

    put(stack, workers.WorkerView, "release", release)


@mutant("a new leader never settles")
def _never_settles(stack: ExitStack) -> None:
    put(stack, members, "settle", nothing)
    handler(stack, events.Settled, nothing)


@mutant("output goes to the stream of another gateway")
def _wrong_stream(stack: ExitStack) -> None:
    def send(state: Any, live: Any, output: Any, out: Any) -> None:
        streams = sorted(gateway.stream_id for gateway in state.gateways.values())
        if streams:
            out.append(lifecycle.SendOutput(streams[0], output))

    for module in (lifecycle, frames, takeover):
        put(stack, module, "send", send)


@mutant("a request that moves begins again at index 0")
def _resumed_from_zero(stack: ExitStack) -> None:
    put(stack, live_requests.LiveRequest, "resume", lambda self: iter(()))


@mutant("what a returning gateway has missed is not sent again")
def _no_catch_up(stack: ExitStack) -> None:
    put(stack, takeover, "_catch_up", nothing)


@mutant("requests of a gateway that is gone are kept for ever")
def _grace_never_over(stack: ExitStack) -> None:
    handler(stack, events.GatewayGraceOver, nothing)


@mutant("what a worker reported and nobody asked for is never cleared away")
def _claims_kept(stack: ExitStack) -> None:
    handler(stack, events.WorkerSettled, nothing)


@mutant("failures are not sent to gateways")
def _failures_lost(stack: ExitStack) -> None:
    put(stack, outflow.Outflow, "add_failure", nothing)


@mutant("a leader that sees another one's term goes on")
def _never_deposed(stack: ExitStack) -> None:
    async def stay(self: Any, *_: Any) -> None:
        await asyncio.sleep(0)

    put(stack, leadership.Leadership, "_depose", stay)
    put(stack, seat.ReignSeat, "deposed", stay)


@mutant("a takeover binds the request but not its stream")
def _not_rebound(stack: ExitStack) -> None:
    put(stack, takeover, "_rebind", nothing)


@mutant("the deadline of a request is ignored and its client's finish, too")
def _finish_ignored(stack: ExitStack) -> None:
    handler(stack, events.ChoiceFinished, nothing)
    handler(stack, events.DeadlinePassed, nothing)
    handler(stack, events.Cancelled, nothing)


@mutant("tokens of a request that moved are charged twice")
def _charged_twice(stack: ExitStack) -> None:
    def produced(live: Any, choice: Any) -> None:
        fresh = len(choice.tokens) - choice.charged
        choice.charged = len(choice.tokens)
        if fresh > 0:
            charges._charge(live, 2 * fresh if live.attempts > 1 else fresh)

    put(stack, charges, "produced", produced)


@mutant("retries are not paid for")
def _retries_unpaid(stack: ExitStack) -> None:
    put(stack, budget.Budget, "take", lambda self, now: True)


@mutant("a worker is put out although it is the last one")
def _last_worker_put_out(stack: ExitStack) -> None:
    put(stack, health, "spare", lambda state, worker: True)
    put(stack, health, "rescue", nothing)


@mutant("a worker that was put out is never tried again")
def _never_tried_again(stack: ExitStack) -> None:
    handler(stack, events.ProbeDue, nothing)


@mutant("a request goes back to the worker that it stalled or died on")
def _tried_again(stack: ExitStack) -> None:
    put(stack, trust.NotAgain, "admits", lambda self, ask, option: True)
    put(stack, trust.Untried, "scores", lambda self, ask, options: ())


@mutant("suspects of an engine's end run together")
def _suspects_together(stack: ExitStack) -> None:
    put(stack, trust.OneSuspect, "admits", lambda self, ask, option: True)


@mutant("whatever ran on an engine that ended is to blame")
def _blamed_at_once(stack: ExitStack) -> None:
    put(stack, suspects, "DEATHS", 1)


# etcd


@mutant("a renewal is believed whatever it says")
def _renewals_believed(stack: ExitStack) -> None:
    def renewed(self: Any, sent_at: float, ttl_s: float, now: float) -> None:
        self.deadline = sent_at + self.ttl_s

    put(stack, lease.Validity, "renewed", renewed)


# The worker


@mutant("commands of a lower term are obeyed")
def _term_fence_dropped(stack: ExitStack) -> None:
    put(stack, worker_core.WorkerCore, "_fence", nothing)


@mutant("a cancel is noted but the engine goes on")
def _cancel_ignored(stack: ExitStack) -> None:
    put(stack, worker_core.WorkerCore, "_stop", lambda self, request_id, epoch: ())


@mutant("attempts of a lost engine are not reported")
def _engine_loss_unreported(stack: ExitStack) -> None:
    def lost(self: Any, reason: str) -> None:
        self._state.ready = self._state.busy = False
        self._shelf.engine_lost()

    put(stack, worker_core.WorkerCore, "engine_lost", lost)


# The gateway


@mutant("a new leader is not told what is unfinished")
def _nothing_resubmitted(stack: ExitStack) -> None:
    put(stack, session.Sessions, "on_connected", lambda self, term: ())


@mutant("frames are never acknowledged")
def _never_acknowledged(stack: ExitStack) -> None:
    put(stack, gateway_outbox.Outbox, "acknowledge", nothing)


@mutant("a gap in a stream is passed over")
def _gap_passed_over(stack: ExitStack) -> None:
    real = transcript.Transcript._judge

    def judge(self: Any, output: Any) -> Any:
        verdict = real(self, output)
        return transcript.Verdict.DUPLICATE if verdict is transcript.Verdict.GAP else verdict

    put(stack, transcript.Transcript, "_judge", judge)
    put(stack, takeover, "_catch_up", nothing)


@mutant("a request that fails its first try is refused at admission for good")
def _admission_forgets(stack: ExitStack) -> None:
    real = admission.unpark

    def unpark(state: Any, now: float, out: Any) -> None:
        if not state.parked:
            real(state, now, out)

    put(stack, admission, "unpark", unpark)
