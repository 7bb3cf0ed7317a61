"""The journal on its way to the schedulers that stand by: everything for a newcomer, then what changes, once a tick."""

from __future__ import annotations

from llmos.internal.v1 import journal_pb2
from scheduler import events
from scheduler.commands import SendJournal
from scheduler.journal import BREAKS, Entry, choice_message
from scheduler.state import Outbox, State


def joined(state: State, event: events.FollowerJoined, now: float, out: Outbox) -> None:
    """Others first hear what has changed; then everybody knows the same."""
    tell(state, now, out)
    state.followers.add(event.follower)
    state.journal.followed = True
    records = [_whole(entry, now) for _, entry in state.journal.entries()]
    records += [
        _removal(request_id, reason, age_s)
        for request_id, age_s, reason in state.tombstones.items(now)
        if reason not in BREAKS
    ]
    out.append(SendJournal(records, event.follower))


def left(state: State, event: events.FollowerLeft, now: float, out: Outbox) -> None:
    """Without followers nothing is marked."""
    state.followers.discard(event.follower)
    if not state.followers:
        state.journal.followed = False
        state.journal.marks.clear()


def tell(state: State, now: float, out: Outbox) -> None:
    """Send what has changed since the last time."""
    journal = state.journal
    if not journal.marks:
        return
    records: list[journal_pb2.JournalRecord] = []
    for request_id, whole in journal.marks.items():
        entry = journal.get(request_id)
        if entry is None:
            if whole:
                reason = state.tombstones.get(request_id, now) or ""
                records.append(_removal(request_id, "" if reason in BREAKS else reason, 0.0))
        elif whole or entry.live is None:
            records.append(_whole(entry, now))
        else:
            records.append(_progress(request_id, entry))
    journal.marks.clear()
    out.append(SendJournal(records))


def inherited(state: State, event: events.JournalInherited, now: float, out: Outbox) -> None:
    """Begin with what was copied of an earlier leader's journal. What was cancelled there stays so."""
    for request_id, reason in event.cancelled:
        state.tombstones.put(request_id, reason, now)
    for entry in event.entries:
        if state.tombstones.get(entry.request.request_id, now) is None:
            state.journal.inherit(entry, now)


def _whole(entry: Entry, now: float) -> journal_pb2.JournalRecord:
    if entry.live is not None:
        entry.sent = [(len(choice.tokens), choice.finished) for choice in entry.live.choices]
    return journal_pb2.JournalRecord(entry=entry.message(now))


def _progress(request_id: str, entry: Entry) -> journal_pb2.JournalRecord:
    live = entry.live
    assert live is not None
    progress = journal_pb2.JournalProgress(
        request_id=request_id, cached_tokens=live.cached_tokens, prompt_charged=live.prompt_charged
    )
    for number, choice in enumerate(live.choices):
        sent, ended = entry.sent[number]
        if len(choice.tokens) > sent or choice.finished != ended:
            progress.choices.append(choice_message(number, choice, sent))
            entry.sent[number] = (len(choice.tokens), choice.finished)
    return journal_pb2.JournalRecord(progress=progress)


def _removal(request_id: str, cancelled: str, age_s: float) -> journal_pb2.JournalRecord:
    removal = journal_pb2.JournalRemoval(request_id=request_id, cancelled=cancelled, age_ms=int(1000 * age_s))
    return journal_pb2.JournalRecord(removal=removal)
