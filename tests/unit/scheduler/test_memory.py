"""What the core remembers: the catalogue, ids, timers, tokens."""

from __future__ import annotations

from llmos.internal.v1 import request_pb2
from scheduler import events
from scheduler.recent import Recent
from scheduler.requests import Choice
from scheduler.timers import Timers
from tests.unit.scheduler.arena import Arena, make_record


def test_a_name_keeps_its_version_while_that_is_loaded() -> None:
    arena = Arena()
    arena.add_worker("w1")
    record = make_record("w2")
    record.models[0].model.version = "v2"
    record.models[0].model.created_unix_s = 99
    arena.post(events.WorkerRegistered(record))
    report = arena.workers["w1"].report()
    report.models[0].version = "v2"
    arena.post(events.WorkerAttached("w2", report))
    catalogue = arena.core.state.catalogue
    assert [model.version for model in catalogue.message().models] == ["v1"]
    revision = catalogue.revision
    arena.kill("w1")
    arena.advance(2)
    assert [model.version for model in catalogue.message().models] == ["v2"]
    assert catalogue.revision > revision


def test_tombstones_are_bounded_and_expire() -> None:
    tombs = Recent[str](ttl_s=10, limit=3)
    for number in range(5):
        tombs.put(f"r{number}", "why", float(number))
    assert len(tombs) == 3
    assert tombs.get("r0", 5.0) is None
    assert tombs.get("r4", 13.9) == "why"
    assert tombs.get("r4", 14.0) is None


def test_timers_fall_due_in_order() -> None:
    timers = Timers()
    for when in (3.0, 1.0, 2.0):
        timers.at(when, events.DeadlinePassed(str(when)))
    assert list(timers.due(2.5)) == [events.DeadlinePassed("1.0"), events.DeadlinePassed("2.0")]
    assert list(timers.due(2.5)) == []


def test_choice_remembers_log_probabilities_from_where_it_knows_them() -> None:
    choice = Choice.resumed(request_pb2.ChoiceResume(token_ids=[1, 2]))
    entries = [request_pb2.LogprobEntry(token_id=token) for token in (3, 4)]
    choice.append([3, 4], entries)
    assert choice.since(3) == ([4], entries[1:])
    choice.truncate(3)
    assert choice.since(2) == ([3], entries[:1])
