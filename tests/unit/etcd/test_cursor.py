"""Exactly once: what a watch delivers of what etcd sends."""

from __future__ import annotations

from typing import Any

from llmos.etcd import KeyValue, WatchEvent
from llmos.etcd import messages as pb
from llmos.etcd.watch import Cursor


def put(key: str, revision: int) -> Any:
    kv = pb.KeyValue(key=key.encode(), value=b"v", mod_revision=revision, create_revision=3, version=1, lease=9)
    return pb.Event(type=pb.Event.PUT, kv=kv)


def delete(key: str, revision: int) -> Any:
    return pb.Event(type=pb.Event.DELETE, kv=pb.KeyValue(key=key.encode(), mod_revision=revision))


def test_events_move_the_cursor_behind_the_last_one() -> None:
    cursor = Cursor(5)
    batch = cursor.advance([put("a", 5), delete("b", 7)])
    assert batch is not None
    assert batch.events == [WatchEvent("a", b"v", 5, 3, 9), WatchEvent("b", None, 7)]
    assert (batch.revision, batch.snapshot) == (7, False)
    assert cursor.next_revision == 8


def test_what_was_delivered_is_dropped() -> None:
    cursor = Cursor(5)
    cursor.advance([put("a", 5), put("b", 6)])
    assert cursor.advance([put("a", 5), put("b", 6)]) is None
    batch = cursor.advance([put("b", 6), put("c", 7)])
    assert batch is not None
    assert [event.key for event in batch.events] == ["c"]


def test_all_changes_of_one_revision_stay_together() -> None:
    batch = Cursor(5).advance([put("a", 5), put("b", 5), delete("c", 5)])
    assert batch is not None
    assert [event.key for event in batch.events] == ["a", "b", "c"]


def test_signs_of_life_do_not_move_the_cursor() -> None:
    """Requested progress can be ahead of events still to come (etcd issue 15220)."""
    cursor = Cursor(5)
    assert cursor.advance([]) is None
    assert cursor.next_revision == 5


def test_snapshot_starts_over() -> None:
    cursor = Cursor(None)
    batch = cursor.snapshot([KeyValue("a", b"v", 3, 5, 2, 9)], 10)
    assert batch.events == [WatchEvent("a", b"v", 5, 3, 9)]
    assert (batch.revision, batch.snapshot) == (10, True)
    assert cursor.next_revision == 11


def test_relisting_delivers_nothing_before_the_snapshot() -> None:
    cursor = Cursor(5)
    cursor.relist()
    assert cursor.next_revision is None
    assert cursor.advance([put("a", 5)]) is None
    assert cursor.snapshot([], 12).events == []
