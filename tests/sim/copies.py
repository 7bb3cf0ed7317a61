"""What a stream of the journal's records comes to, by the contract alone: `protos/llmos/internal/v1/journal.proto`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from llmos.internal.v1 import journal_pb2

if TYPE_CHECKING:
    from tests.sim.bills import Paid

LIVE = journal_pb2.JOURNAL_PHASE_LIVE
ENDED = journal_pb2.JOURNAL_PHASE_ENDED


class Astray(Exception):
    """A record does not follow on what was said before."""


@dataclass(slots=True)
class Copy:
    """What was said of one request."""

    request_id: str
    origin_id: str
    tenant: str
    prompt: tuple[int, ...]
    seed: int
    size: int
    """Bytes of the entry without its tokens, roughly."""
    most: int
    """Tokens of a choice at most."""
    claim: int
    open_from: int
    phase: int
    over_at: float
    tokens: list[tuple[int, ...]]
    finished: list[bool]
    paid: Paid | None = None
    """What its tenant had paid for when that was said, by the leader's bills."""

    @classmethod
    def of(cls, entry: journal_pb2.JournalEntry, now: float) -> Copy:
        """An entry as it comes."""
        request = entry.request
        choices = sorted(entry.choices, key=lambda said: said.choice)
        return cls(
            request_id=request.request_id,
            origin_id=entry.origin_id,
            tenant=request.tenant,
            prompt=tuple(request.token_ids),
            seed=request.sampling.seed,
            size=entry.ByteSize() + 512 - sum(len(said.token_ids) for said in choices),
            most=request.max_tokens,
            claim=entry.claim,
            open_from=entry.open_from,
            phase=entry.phase,
            over_at=now - entry.age_ms / 1000,
            tokens=[tuple(said.token_ids) for said in choices],
            finished=[said.finished for said in choices],
        )


@dataclass(slots=True)
class Copies:
    """Requests by id, and what was cancelled."""

    entries: dict[str, Copy] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)
    quarantined: set[str] = field(default_factory=set)
    """Marks of prompts."""

    def take(self, records: Iterable[journal_pb2.JournalRecord], now: float) -> list[str]:
        """Apply records in order; returns whom they were about. Raises Astray."""
        about = []
        for record in records:
            kind = record.WhichOneof("change")
            if kind == "entry":
                copy = Copy.of(record.entry, now)
                self.entries[copy.request_id] = copy
                about.append(copy.request_id)
            elif kind == "progress":
                self._longer(record.progress)
                about.append(record.progress.request_id)
            elif kind == "removal":
                self.entries.pop(record.removal.request_id, None)
                if record.removal.cancelled:
                    self.cancelled.add(record.removal.request_id)
                about.append("")
            elif kind == "quarantine":
                self.quarantined.add(record.quarantine.mark)
                about.append("")
        return about

    def _longer(self, progress: journal_pb2.JournalProgress) -> None:
        copy = self.entries.get(progress.request_id)
        if copy is None:
            raise Astray(f"more of {progress.request_id}, which is not known")
        for said in progress.choices:
            before = copy.tokens[said.choice]
            if said.index > len(before):
                raise Astray(f"{progress.request_id}: index {said.index} after {len(before)} tokens")
            copy.tokens[said.choice] = (*before[: said.index], *said.token_ids)
            copy.finished[said.choice] = said.finished

    def left(self, now: float, ttl_s: float) -> Copies:
        """What of it is not too old."""
        fresh = {name: one for name, one in self.entries.items() if one.phase == LIVE or now < one.over_at + ttl_s}
        return Copies(fresh, set(self.cancelled), set(self.quarantined))


@dataclass(slots=True)
class Follower:
    """What one standby was told, in all its streams."""

    term: int = 0
    known: Copies = field(default_factory=Copies)
    _coming: Copies | None = None
    _sequence: int = 0
    _astray: bool = True

    def begin(self) -> None:
        """It asks for the journal: everything comes, and replaces what is known once it is complete."""
        self._coming, self._sequence, self._astray = Copies(), 0, False

    def take(self, batch: journal_pb2.FollowResponse, now: float, paid: dict[bytes, Paid]) -> bool:
        """Take in a batch; whether it must be accepted."""
        if self._astray or batch.term < self.term or batch.sequence != self._sequence + 1:
            self._astray = True
            return False
        self.term, self._sequence = batch.term, batch.sequence
        into = self.known if self._coming is None else self._coming
        try:
            about = into.take(batch.records, now)
        except Astray:
            self._astray = True
            return False
        for record, request_id in zip(batch.records, about, strict=True):
            if request_id in into.entries:
                into.entries[request_id].paid = paid.get(key_of(record))
        if self._coming is not None and not batch.snapshot:
            self.known, self._coming = self._coming, None
        return True

    def bequeath(self, term: int, now: float, ttl_s: float) -> Copies:
        """What a reign of this term must begin with. Nothing is left here."""
        self.term = max(self.term, term)
        known, self.known, self._coming, self._astray = self.known, Copies(), None, True
        known = known.left(now, ttl_s)
        for name, one in known.entries.items():
            known.entries[name] = replace(one, over_at=now if one.phase == LIVE else one.over_at)
        return known


def key_of(record: journal_pb2.JournalRecord) -> bytes:
    """Names a record wherever it arrives."""
    return record.SerializeToString(deterministic=True)
