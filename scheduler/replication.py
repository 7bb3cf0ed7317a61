"""The journal on its way to the schedulers that stand by: everything for a newcomer, then what changes, once a tick.

No record is larger than a message may be: of a large entry first comes what was asked, then its output piece by piece,
each piece a state in which a leader could take it over.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from llmos.internal.v1 import journal_pb2
from scheduler import events
from scheduler.commands import SendJournal
from scheduler.journal import BREAKS, Entry, choice_message
from scheduler.state import Outbox, State

LIMIT_BYTES = 31 * 1024 * 1024
"""Most bytes of a record; a message may have one MiB more. What was asked may be nearly as long as that."""
PIECE_BYTES = 1024 * 1024
"""Most bytes of output in a record, roughly."""
_TOKEN_BYTES = 16
"""What a token takes, beside its log-probabilities, at most."""


def joined(state: State, event: events.FollowerJoined, now: float, out: Outbox) -> None:
    """Others first hear what has changed; then everybody knows the same."""
    tell(state, now, out)
    state.followers.add(event.follower)
    state.journal.followed = True
    records = [record for _, entry in state.journal.entries() for record in _whole(state, entry, now)]
    records += [
        _removal(request_id, reason, age_s)
        for request_id, age_s, reason in state.tombstones.items(now)
        if reason not in BREAKS
    ]
    records += _quarantines(state, now)
    out.append(SendJournal(records, event.follower))


def left(state: State, event: events.FollowerLeft, now: float, out: Outbox) -> None:
    """Without followers nothing is marked."""
    state.followers.discard(event.follower)
    if not state.followers:
        state.journal.followed = False
        state.journal.marks.clear()
        state.condemned.clear()


def tell(state: State, now: float, out: Outbox) -> None:
    """Send what has changed since the last time."""
    journal = state.journal
    if not journal.marks and not state.condemned:
        return
    records = _quarantines(state, now, state.condemned)
    state.condemned.clear()
    for request_id, whole in journal.marks.items():
        entry = journal.get(request_id)
        if entry is None:
            if whole:
                reason = state.tombstones.get(request_id, now) or ""
                records.append(_removal(request_id, "" if reason in BREAKS else reason, 0.0))
        elif whole or entry.live is None:
            records += _whole(state, entry, now)
        elif not entry.left_out:
            records += _progress(request_id, entry)
    journal.marks.clear()
    out.append(SendJournal(records))


def inherited(state: State, event: events.JournalInherited, now: float, out: Outbox) -> None:
    """Begin with what was copied of an earlier leader's journal. What was cancelled there stays so, and what is in
    quarantine."""
    for mark, request_id, left_s in sorted(event.quarantined, key=lambda one: one[2]):
        state.quarantine.put(mark, request_id, now + left_s - state.policy.quarantine_s)
    for request_id, reason in event.cancelled:
        state.tombstones.put(request_id, reason, now)
    for entry in event.entries:
        if state.tombstones.get(entry.request.request_id, now) is None:
            state.journal.inherit(entry, now)


def _whole(state: State, entry: Entry, now: float) -> list[journal_pb2.JournalRecord]:
    if entry.live is not None:
        entry.sent = [(len(choice.tokens), choice.finished) for choice in entry.live.choices]
    said = entry.message(now)
    if said.ByteSize() <= PIECE_BYTES:
        return [journal_pb2.JournalRecord(entry=said)]
    bare = journal_pb2.JournalEntry()
    bare.CopyFrom(said)
    del bare.choices[:]
    bare.choices.extend(journal_pb2.JournalChoice(choice=choice.choice) for choice in said.choices)
    entry.left_out = bare.ByteSize() > LIMIT_BYTES
    if entry.left_out:
        state.counters["journal_left_out"] += 1
        return [_removal(said.request.request_id, "", 0.0)]
    progress = journal_pb2.JournalProgress(
        request_id=said.request.request_id, cached_tokens=said.cached_tokens, prompt_charged=said.prompt_charged
    )
    return [journal_pb2.JournalRecord(entry=bare), *_in_pieces(progress, said.choices)]


def _progress(request_id: str, entry: Entry) -> list[journal_pb2.JournalRecord]:
    live = entry.live
    assert live is not None
    progress = journal_pb2.JournalProgress(
        request_id=request_id, cached_tokens=live.cached_tokens, prompt_charged=live.prompt_charged
    )
    grown = []
    for number, choice in enumerate(live.choices):
        sent, ended = entry.sent[number]
        if len(choice.tokens) > sent or choice.finished != ended:
            grown.append(choice_message(number, choice, sent))
            entry.sent[number] = (len(choice.tokens), choice.finished)
    if sum(choice.ByteSize() for choice in grown) <= PIECE_BYTES:
        progress.choices.extend(grown)
        return [journal_pb2.JournalRecord(progress=progress)]
    return _in_pieces(progress, grown)


def _in_pieces(
    head: journal_pb2.JournalProgress, choices: Iterable[journal_pb2.JournalChoice]
) -> list[journal_pb2.JournalRecord]:
    """Output in records of `PIECE_BYTES` at most, or one token; only a choice's last piece says that it has ended."""
    records = []
    for choice in choices:
        first_known = len(choice.token_ids) - len(choice.logprobs)
        ends = _cuts(choice, first_known)
        for begin, end in zip([0, *ends], ends, strict=False):
            piece = journal_pb2.JournalChoice(
                choice=choice.choice,
                index=choice.index + begin,
                token_ids=choice.token_ids[begin:end],
                logprobs=choice.logprobs[max(0, begin - first_known) : max(0, end - first_known)],
                charged=choice.charged,
            )
            if end == ends[-1]:
                piece.finished, piece.finish_reason = choice.finished, choice.finish_reason
            record = journal_pb2.JournalRecord(progress=head)
            record.progress.choices.append(piece)
            records.append(record)
    return records


def _cuts(choice: journal_pb2.JournalChoice, first_known: int) -> list[int]:
    """Numbers of tokens at which its pieces end; the last is all of them."""
    cuts, size = [], 0
    for position in range(len(choice.token_ids)):
        logprobs = choice.logprobs[position - first_known].ByteSize() if position >= first_known else 0
        if size and size + logprobs + _TOKEN_BYTES > PIECE_BYTES:
            cuts.append(position)
            size = 0
        size += logprobs + _TOKEN_BYTES
    return [*cuts, len(choice.token_ids)]


def _removal(request_id: str, cancelled: str, age_s: float) -> journal_pb2.JournalRecord:
    removal = journal_pb2.JournalRemoval(request_id=request_id, cancelled=cancelled, age_ms=int(1000 * age_s))
    return journal_pb2.JournalRecord(removal=removal)


def _quarantines(state: State, now: float, marks: Collection[str] | None = None) -> list[journal_pb2.JournalRecord]:
    """Prompts that workers died of; all of them, or those of `marks`."""
    known = [] if marks is not None and not marks else state.quarantine.items(now)
    return [
        journal_pb2.JournalRecord(
            quarantine=journal_pb2.JournalQuarantine(
                mark=mark, request_id=request_id, left_ms=max(0, int(1000 * (state.policy.quarantine_s - age_s)))
            )
        )
        for mark, age_s, request_id in known
        if marks is None or mark in marks
    ]
