"""Seeded bugs of the journal: of those who remember streams, of those who copy them, of those who go on with them."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from gateway import remainder, stream
from llmos.internal.v1 import journal_pb2
from scheduler import admission, charges, events, following, journal, replica, replication, takeover
from tests.sim.planting import handler, mutant, nothing, put

_Journal, _Replica = journal.Journal, replica.Replica
_BREAKS = frozenset({"client_gone", "slow_reader", "deadline", "broken"})


# The leader's memory


@mutant("a client that comes back has the claim of the one before")
def _claim_not_raised(stack: ExitStack) -> None:
    real = _Journal.take_up

    def take_up(self: Any, tenant: str, origin_ids: Any, now: float) -> Any:
        answer = real(self, tenant, origin_ids, now)
        if answer is not None:
            answer.claim -= 1
            self.get(answer.request.request_id).claim -= 1
        return answer

    put(stack, _Journal, "take_up", take_up)


@mutant("a lower claim takes a stream from a higher one", dense=True)
def _old_claim_not_fenced(stack: ExitStack) -> None:
    real = takeover.take_up

    def take_up(state: Any, live: Any, event: Any, gateway_id: str, out: Any) -> None:
        if event.claim < live.claim:
            live.claim = event.claim
            takeover._rebind(state, live, event.stream_id, gateway_id)
        else:
            real(state, live, event, gateway_id, out)

    put(stack, takeover, "take_up", take_up)


@mutant("what was cancelled is still remembered, and may be taken up")
def _cancelled_is_remembered(stack: ExitStack) -> None:
    put(stack, _Journal, "cancel", nothing)
    put(stack, journal, "_KEPT", journal._KEPT | {"cancelled", "killed"})


@mutant("a stream is given to another tenant")
def _wrong_tenant(stack: ExitStack) -> None:
    real = _Journal.take_up

    def take_up(self: Any, tenant: str, origin_ids: Any, now: float) -> Any:
        known = [self.get(self._by_origin.get(name, "")) for name in origin_ids]
        tenants = [entry.request.tenant for entry in known if entry is not None]
        return real(self, *(tenants[:1] or [tenant]), origin_ids, now)

    put(stack, _Journal, "take_up", take_up)


@mutant("a stream is handed out with another one's sealed blob")
def _blob_of_another(stack: ExitStack) -> None:
    real = _Journal.take_up

    def take_up(self: Any, tenant: str, origin_ids: Any, now: float) -> Any:
        answer = real(self, tenant, origin_ids, now)
        if answer is not None:
            answer.sealed = next(entry.sealed for _, entry in self.entries())
        return answer

    put(stack, _Journal, "take_up", take_up)


@mutant("what is over is remembered for ever")
def _never_forgotten(stack: ExitStack) -> None:
    put(stack, _Journal, "purge", nothing)


@mutant("byte limits of what is remembered are not kept")
def _no_byte_limit(stack: ExitStack) -> None:
    real = _Journal._lay_down

    def lay_down(self: Any, entry: Any, now: float) -> None:
        self._limit_bytes = self._tenant_limit_bytes = 1 << 40
        real(self, entry, now)

    put(stack, _Journal, "_lay_down", lay_down)


@mutant("where there is too much, a stream that runs gives way")
def _live_evicted(stack: ExitStack) -> None:
    real = _Journal._give_way

    def give_way(self: Any, request_id: str) -> None:
        live = [name for name, entry in self.entries() if entry.live is not None]
        if live:
            self._forget(live[0])
        real(self, request_id)

    put(stack, _Journal, "_give_way", give_way)


@mutant("a client that comes back pays for its prompt again")
def _prompt_charged_again(stack: ExitStack) -> None:
    put(stack, charges, "inherited", nothing)


@mutant("streams of a gateway that was lost are not remembered", dense=True)
def _lost_gateway_forgotten(stack: ExitStack) -> None:
    put(stack, journal, "_KEPT", journal._KEPT - {"gateway_lost"})


# Who may compute


@mutant("what a client broke off runs on")
def _broken_runs_on(stack: ExitStack) -> None:
    real = admission.cancelled

    def cancelled(state: Any, event: Any, now: float, out: Any) -> None:
        if event.reason not in _BREAKS:
            real(state, event, now, out)

    handler(stack, events.Cancelled, cancelled)


@mutant("the late cancel of an old claim stops a later one")
def _old_claim_cancels(stack: ExitStack) -> None:
    real = admission.cancelled

    def cancelled(state: Any, event: Any, now: float, out: Any) -> None:
        live = state.requests.get(event.request_id)
        stream_id = live.stream_id if live is not None else event.stream_id
        real(state, replace(event, claim=1 << 60, stream_id=stream_id), now, out)

    handler(stack, events.Cancelled, cancelled)


@mutant("a gateway lets go of a stream without a word to the scheduler")
def _gone_untold(stack: ExitStack) -> None:
    def abort(self: Any, error: Any, reason: str) -> None:
        self.fail(error, deliver=False)

    put(stack, stream.Stream, "abort", abort)


# Copies


@mutant("a new leader begins with nothing")
def _nothing_inherited(stack: ExitStack) -> None:
    put(stack, following.JournalFollower, "inheritance", lambda self, term: events.JournalInherited((), ()))


@mutant("what is over is young again under a new leader")
def _age_forgotten(stack: ExitStack) -> None:
    real = _Journal.inherit

    def inherit(self: Any, said: journal_pb2.JournalEntry, now: float) -> None:
        said.age_ms = 0
        real(self, said, now)

    put(stack, _Journal, "inherit", inherit)


@mutant("progress is added wherever the copy ends")
def _progress_misplaced(stack: ExitStack) -> None:
    def advance(self: Any, table: Any, progress: Any) -> None:
        copy = table.entries.get(progress.request_id)
        for said in progress.choices if copy is not None else ():
            choice = copy.entry.choices[said.choice]
            choice.token_ids.extend(said.token_ids[1:])
            choice.finished, choice.charged = said.finished, said.charged

    put(stack, _Replica, "_advance", advance)


@mutant("an older copy of a stream stays in the place of a newer one")
def _older_copy_kept(stack: ExitStack) -> None:
    real = _Replica._apply

    def apply(self: Any, table: Any, record: Any, now: float) -> None:
        if record.WhichOneof("change") != "entry" or record.entry.request.request_id not in table.entries:
            real(self, table, record, now)

    put(stack, _Replica, "_apply", apply)


@mutant("standbys are not told what was cancelled")
def _cancels_untold(stack: ExitStack) -> None:
    real = replication._removal
    put(stack, replication, "_removal", lambda request_id, cancelled, age_s: real(request_id, "", age_s))


@mutant("standbys are not told of output")
def _progress_untold(stack: ExitStack) -> None:
    put(stack, _Journal, "grown", nothing)


# The gateway that goes on


@mutant("a client that comes back gets one token less than it lacks")
def _index_plus_one(stack: ExitStack) -> None:
    real = remainder.Remainder.__init__

    def begin(self: Any, held: Any, choices: int, max_tokens: int) -> None:
        more = [replace(one, tokens=min(one.tokens + 1, max_tokens)) for one in held]
        real(self, more, choices, max_tokens)

    put(stack, remainder.Remainder, "__init__", begin)


@mutant("a client that comes back gets text that it has again")
def _characters_repeated(stack: ExitStack) -> None:
    real = remainder.Remainder.__init__

    def begin(self: Any, held: Any, choices: int, max_tokens: int) -> None:
        real(self, [replace(one, chars=max(0, one.chars - 1)) for one in held], choices, max_tokens)

    put(stack, remainder.Remainder, "__init__", begin)


@mutant("a choice that a client has whole ends once more")
def _ends_once_more(stack: ExitStack) -> None:
    real = remainder.Remainder.__init__

    def begin(self: Any, held: Any, choices: int, max_tokens: int) -> None:
        real(self, [replace(one, ended=False) for one in held], choices, max_tokens)

    put(stack, remainder.Remainder, "__init__", begin)
