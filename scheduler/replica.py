"""A copy of the leader's journal, kept by a scheduler that stands by. Pure.

A stream of batches begins with everything; what was known before is valid until that is complete, so that a leader that
dies in the middle takes nothing along.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llmos.errors import StaleTerm
from llmos.internal.v1 import journal_pb2
from scheduler.events import JournalInherited

_NO_STREAM = -2
"""As the sequence: no batch follows on it."""
_MOST_QUARANTINED = 4096
"""The oldest give way."""


class OutOfStep(Exception):
    """A batch does not follow on what is known: begin anew."""


@dataclass(slots=True)
class _Copy:
    entry: journal_pb2.JournalEntry
    over_at: float


@dataclass(slots=True)
class _Table:
    entries: dict[str, _Copy] = field(default_factory=dict)
    cancelled: dict[str, tuple[str, float]] = field(default_factory=dict)
    quarantined: dict[str, tuple[str, float]] = field(default_factory=dict)
    """By mark: who found it, and until when."""


class Replica:
    """Owned by one follower."""

    def __init__(self, ttl_s: float, tombstone_ttl_s: float = 120.0) -> None:
        """`ttl_s` is how long the journal keeps what is over, `tombstone_ttl_s` how long a cancelled id is refused."""
        self.term = 0
        """Highest one seen."""
        self._ttl_s = ttl_s
        self._tombstone_ttl_s = tombstone_ttl_s
        self._table = _Table()
        self._coming: _Table | None = None
        self._sequence = _NO_STREAM

    def __len__(self) -> int:
        return len(self._table.entries)

    def begin(self) -> None:
        """A new stream begins."""
        self._coming = _Table()
        self._sequence = 0

    def take(self, batch: journal_pb2.FollowResponse, now: float) -> None:
        """Take in the next batch. Raises StaleTerm if it is a deposed leader's, OutOfStep if something is missing."""
        if batch.term < self.term:
            raise StaleTerm(f"a journal of term {batch.term}, below {self.term}")
        if batch.sequence != self._sequence + 1:
            raise OutOfStep(f"batch {batch.sequence} follows {self._sequence}")
        self.term, self._sequence = batch.term, batch.sequence
        table = self._coming or self._table
        for record in batch.records:
            self._apply(table, record, now)
        if self._coming is not None and not batch.snapshot:
            self._table, self._coming = self._coming, None
        self._expire(now)

    def inheritance(self, now: float) -> JournalInherited:
        """Everything, oldest first, with ages as of now; what was cancelled, and what workers died of. Leaves nothing
        here; what comes on a stream that began before is out of step."""
        self._expire(now)
        table, self._table, self._coming, self._sequence = self._table, _Table(), None, _NO_STREAM
        copies = sorted(table.entries.values(), key=lambda copy: copy.over_at)
        for copy in copies:
            alive = copy.entry.phase == journal_pb2.JOURNAL_PHASE_LIVE
            copy.entry.age_ms = 0 if alive else max(0, int(1000 * (now - copy.over_at)))
        live = [copy.entry for copy in copies if copy.entry.phase == journal_pb2.JOURNAL_PHASE_LIVE]
        over = [copy.entry for copy in copies if copy.entry.phase != journal_pb2.JOURNAL_PHASE_LIVE]
        return JournalInherited(
            (*over, *live),
            tuple((request_id, reason) for request_id, (reason, _) in table.cancelled.items()),
            tuple((mark, name, until - now) for mark, (name, until) in table.quarantined.items() if until > now),
        )

    def _apply(self, table: _Table, record: journal_pb2.JournalRecord, now: float) -> None:
        match record.WhichOneof("change"):
            case "entry":
                entry = record.entry
                table.entries.pop(entry.request.request_id, None)
                table.entries[entry.request.request_id] = _Copy(entry, now - entry.age_ms / 1000)
            case "progress":
                self._advance(table, record.progress)
            case "removal":
                removal = record.removal
                table.entries.pop(removal.request_id, None)
                if removal.cancelled:
                    table.cancelled[removal.request_id] = (removal.cancelled, now - removal.age_ms / 1000)
            case "quarantine":
                said = record.quarantine
                table.quarantined.pop(said.mark, None)
                table.quarantined[said.mark] = (said.request_id, now + said.left_ms / 1000)
                if len(table.quarantined) > _MOST_QUARANTINED:
                    del table.quarantined[next(iter(table.quarantined))]

    def _advance(self, table: _Table, progress: journal_pb2.JournalProgress) -> None:
        copy = table.entries.get(progress.request_id)
        if copy is None:
            raise OutOfStep("more of a request that is not known")
        copy.entry.cached_tokens, copy.entry.prompt_charged = progress.cached_tokens, progress.prompt_charged
        for said in progress.choices:
            choice = copy.entry.choices[said.choice]
            if said.index != len(choice.token_ids):
                raise OutOfStep(f"index {said.index} follows {len(choice.token_ids)} tokens")
            if len(said.logprobs) < len(said.token_ids):
                del choice.logprobs[:]
            choice.token_ids.extend(said.token_ids)
            choice.logprobs.extend(said.logprobs)
            choice.finished, choice.finish_reason, choice.charged = said.finished, said.finish_reason, said.charged

    def _expire(self, now: float) -> None:
        """What is over has its time here too: its leader may not live to say so."""
        until = now - self._ttl_s
        entries, cancelled = self._table.entries, self._table.cancelled
        while entries:
            oldest = next(iter(entries))
            copy = entries[oldest]
            if copy.entry.phase == journal_pb2.JOURNAL_PHASE_LIVE or copy.over_at > until:
                break
            del entries[oldest]
        until = now - self._tombstone_ttl_s
        for request_id in [name for name, (_, at) in cancelled.items() if at <= until]:
            del cancelled[request_id]
