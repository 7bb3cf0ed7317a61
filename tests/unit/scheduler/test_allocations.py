"""Promises of resources: pinned, between a minimum and a maximum, on request, and who gives way to whom."""

from __future__ import annotations

from llmos.v1 import fleet_pb2
from scheduler.policy import Policy
from tests.unit.scheduler.ledger_arena import GIB, LedgerArena, job, replicas

GUARANTEED = fleet_pb2.RESOURCE_CLASS_GUARANTEED
BEST_EFFORT = fleet_pb2.RESOURCE_CLASS_BEST_EFFORT


def test_without_promises_workers_load_what_fits() -> None:
    arena = LedgerArena()
    arena.add("w1", {"a": 4, "b": 8})
    arena.add("w2", {"a": 4, "c": 40})
    arena.run(5)
    assert arena.loaded("a") == ["w1", "w2"]
    assert arena.loaded("b") == ["w1"]
    assert arena.core.state.workers["w2"].slots["c"].state == fleet_pb2.MODEL_STATE_UNFIT
    assert [held.model for held in arena.written["w1"].assignments] == ["a", "b"]


def test_a_pinned_model_is_where_it_is_pinned_and_nowhere_else() -> None:
    arena = LedgerArena()
    for number in range(4):
        arena.add(f"w{number}", {"a": 4})
    arena.promise(replicas("p", "a", pinned=("w1", "host-w3"), most=2))
    arena.run(20)
    assert arena.loaded("a") == ["w1", "w3"]
    assert not arena.machines["w0"].running
    arena.lose("w1")
    arena.run(20)
    assert arena.loaded("a") == ["w3"], "a pin is a place, not a number"
    arena.add("w1", {"a": 4})
    arena.run(5)
    assert arena.loaded("a") == ["w1", "w3"]


def test_a_minimum_survives_the_loss_of_a_worker() -> None:
    arena = LedgerArena()
    for number in range(3):
        arena.add(f"w{number}", {"a": 4})
    arena.promise(replicas("p", "a", 2, 2))
    arena.run(20)
    before = arena.loaded("a")
    assert len(before) == 2
    arena.lose(before[0])
    arena.run(5)
    assert len(arena.loaded("a")) == 2


def test_scale_to_zero_and_back_on_request() -> None:
    arena = LedgerArena()
    arena.promise(replicas("p", "a", 0, 1))
    arena.add("w1", {"a": 4})
    arena.run(10)
    assert arena.loaded("a") == []
    (asked,) = arena.ask("a")
    assert asked not in arena.failed, "offered, loaded nowhere: it waits"
    arena.run(8)
    assert asked in arena.ended
    assert arena.loaded("a") == ["w1"]
    arena.run(30)
    assert arena.loaded("a") == []
    arena.ask("a")
    arena.run(8)
    assert not arena.failed
    assert arena.loaded("a") == ["w1"]


def test_a_model_drains_before_it_goes() -> None:
    arena = LedgerArena()
    for number in range(2):
        arena.add(f"w{number}", {"a": 4})
    arena.run(4)
    asked = arena.ask("a", tokens=60, count=8)
    arena.run(1)
    assert all(machine.running for machine in arena.machines.values())
    arena.promise(replicas("p", "a", 1, 1))
    arena.run(1)
    assert len(arena.loaded("a")) == 2, "it has time to finish"
    arena.run(30)
    assert len(arena.loaded("a")) == 1
    assert arena.ended >= set(asked)
    assert not arena.failed


def test_best_effort_job_gives_way_to_a_guaranteed_model() -> None:
    arena = LedgerArena()
    arena.promise(replicas("later", "b", 0, 1, kind=GUARANTEED))
    arena.add("w1", {"a": 4, "b": 6}, memory=20 * GIB)
    arena.run(5)
    arena.promise(job("soak", 9 * GIB))
    arena.run(1)
    assert arena.jobs() == {"soak": "w1"}
    arena.promise(replicas("later", "b", 1, 1, kind=GUARANTEED, revision=2))
    arena.run(0.5)
    assert arena.jobs() == {}, "at once"
    arena.run(5)
    assert arena.loaded("b") == ["w1"]
    assert arena.loaded("a") == ["w1"]
    arena.take_back("later")


def test_a_best_effort_model_gives_way_and_its_requests_move() -> None:
    arena = LedgerArena()
    arena.promise(replicas("low", "a", 2, 2, kind=BEST_EFFORT))
    arena.add("w1", {"a": 9, "b": 9})
    arena.add("w2", {"a": 9})
    arena.run(5)
    assert arena.loaded("a") == ["w1", "w2"]
    asked = arena.ask("a", tokens=40, count=6)
    arena.run(0.5)
    arena.promise(replicas("high", "b", 1, 1, kind=GUARANTEED))
    arena.run(6)
    assert arena.loaded("b") == ["w1"]
    assert arena.loaded("a") == ["w2"]
    arena.run(20)
    assert arena.ended >= set(asked)
    assert not arena.failed


def test_what_is_guaranteed_is_never_taken_away() -> None:
    arena = LedgerArena()
    arena.promise(replicas("first", "a", 1, 1, kind=GUARANTEED))
    arena.add("w1", {"a": 9, "b": 9})
    arena.run(5)
    arena.promise(replicas("second", "b", 1, 1, kind=GUARANTEED))
    arena.promise(job("third", 12 * GIB, kind=GUARANTEED))
    arena.run(20)
    assert arena.loaded("a") == ["w1"]
    assert arena.machines["w1"].unloads.count("a") <= 1, "at most to be loaded again with less"
    assert arena.jobs() == {}


def test_a_guaranteed_job_gets_what_models_have_beyond_their_need() -> None:
    arena = LedgerArena()
    arena.promise(replicas("first", "a", 1, 1, kind=GUARANTEED))
    arena.add("w1", {"a": 4})
    arena.run(5)
    assert arena.machines["w1"].states["a"].budget_bytes == 16 * GIB
    arena.promise(job("train", 8 * GIB, kind=GUARANTEED))
    arena.run(10)
    assert arena.jobs() == {"train": "w1"}
    assert arena.loaded("a") == ["w1"]
    assert arena.machines["w1"].states["a"].budget_bytes == 8 * GIB


def test_a_default_model_shrinks_for_a_job_that_is_set_aside_and_not_for_one_that_is_not() -> None:
    arena = LedgerArena()
    arena.add("w1", {"a": 4})
    arena.run(5)
    arena.promise(job("spare", 2 * GIB))
    arena.run(5)
    assert arena.jobs() == {}
    arena.take_back("spare")
    arena.promise(job("firm", 2 * GIB, kind=fleet_pb2.RESOURCE_CLASS_BURSTABLE))
    arena.run(8)
    assert arena.jobs() == {"firm": "w1"}
    assert arena.loaded("a") == ["w1"]
    assert arena.machines["w1"].states["a"].budget_bytes == 14 * GIB


def test_idle_models_do_not_take_turns() -> None:
    arena = LedgerArena(Policy())
    arena.promise(replicas("one", "a", 0, 1))
    arena.promise(replicas("two", "b", 0, 1))
    arena.add("w1", {"a": 9, "b": 9})
    arena.ask("a")
    arena.run(6)
    assert arena.loaded("a") == ["w1"]
    arena.ask("b")
    arena.run(8)
    assert arena.loaded("b") == ["w1"]
    arena.run(30)
    assert arena.machines["w1"].unloads == ["a"]
    assert not arena.failed


def test_promises_hold_over_a_change_of_leaders() -> None:
    arena = LedgerArena()
    for number in range(3):
        arena.add(f"w{number}", {"a": 4, "b": 4})
    arena.promise(replicas("p", "a", 1, 2, kind=GUARANTEED))
    arena.promise(replicas("q", "b", 0, 1))
    arena.promise(job("train", 6 * GIB))
    arena.run(30)
    before = arena.loaded("a"), arena.jobs()
    assert before[1]
    unloads = {machine.id: list(machine.unloads) for machine in arena.machines.values()}
    arena.fail_over()
    arena.run(5)
    assert (arena.loaded("a"), arena.jobs()) == before
    assert {machine.id: machine.unloads for machine in arena.machines.values()} == unloads


def test_measured_memory_corrects_later_placements() -> None:
    arena = LedgerArena()
    arena.add("w1", {"a": 10})
    arena.run(5)
    said = arena.machines["w1"].states["a"]
    said.measured_fixed_bytes = 17 * GIB
    arena.machines["w1"].changed.add("a")
    arena.run(1)
    arena.add("w2", {"a": 10})
    arena.run(5)
    assert arena.loaded("a") == ["w1"], "it is known to take more than w2 has"
