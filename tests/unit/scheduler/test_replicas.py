"""How many replicas are wanted: follows a step of load, in virtual time, without flapping."""

from __future__ import annotations

import dataclasses

import pytest

from scheduler.allocation.replicas import Bounds, Load, Replicas
from scheduler.policy import Policy
from tests.unit.scheduler.ledger_arena import LedgerArena, replicas

BOUNDS = Bounds(least=1, most=4, up_s=1.0, down_s=10.0, idle_s=5.0)
QUIET = Load(waiting=0, running=2, per_replica=8, loaded=1, arrivals=0, departures=0, load_s=3.0)


def watched(state: Replicas, load: Load, seconds: float, start: float, **rates: float) -> list[int]:
    """What is wanted at each half second; requests arrive and end at constant rates."""
    wanted = []
    for step in range(int(seconds * 2)):
        arrivals = int(rates.get("arriving", 0) * (start + step / 2))
        departures = int(rates.get("ending", 0) * (start + step / 2))
        seen = dataclasses.replace(load, arrivals=arrivals, departures=departures)
        wanted.append(state.look(seen, BOUNDS, start + step / 2))
    return wanted


def test_a_moment_of_need_adds_nothing() -> None:
    state = Replicas(1)
    busy = dataclasses.replace(QUIET, waiting=20)
    assert watched(state, busy, 1.0, 0.0) == [1, 1]
    assert set(watched(state, QUIET, 5.0, 1.0)) == {1}


def test_lasting_need_adds_as_many_as_are_needed_within_bounds() -> None:
    state = Replicas(1)
    assert watched(state, dataclasses.replace(QUIET, waiting=20), 2.0, 0.0)[-1] == 3
    assert watched(state, dataclasses.replace(QUIET, waiting=500), 3.0, 2.0)[-1] == 4


def test_no_replica_that_would_come_later_than_the_queue_drains() -> None:
    slow = dataclasses.replace(QUIET, waiting=20, load_s=60.0)
    assert watched(Replicas(1), slow, 4.0, 0.0, ending=5.0)[-1] == 1, "14 too many are gone in 3 s"
    assert watched(Replicas(1), slow, 4.0, 0.0, ending=5.0, arriving=6.0)[-1] == 3, "the queue grows"


def test_one_goes_after_long_without_need_and_not_if_the_others_would_be_full() -> None:
    state = Replicas(3)
    half = dataclasses.replace(QUIET, running=10, loaded=3)
    wanted = watched(state, half, 12.0, 0.0)
    assert (wanted[0], wanted[-1]) == (3, 2)
    full = dataclasses.replace(QUIET, running=15, loaded=2)
    assert set(watched(state, full, 30.0, 12.0)) == {2}


def test_a_long_load_is_a_reason_to_keep_what_is_there() -> None:
    slow = dataclasses.replace(QUIET, load_s=20.0, loaded=2)
    wanted = watched(Replicas(2), slow, 50.0, 0.0)
    assert wanted[2 * 39] == 2
    assert wanted[-1] == 1


def test_zero_after_idling_and_back_with_the_first_request() -> None:
    bounds = dataclasses.replace(BOUNDS, least=0)
    state = Replicas(1)
    nothing = dataclasses.replace(QUIET, running=0)
    wanted = [state.look(nothing, bounds, step / 2) for step in range(14)]
    assert (wanted[9], wanted[-1]) == (1, 0)
    assert state.look(dataclasses.replace(nothing, waiting=1, loaded=0), bounds, 8.0) == 1


@pytest.mark.parametrize("load_s", [1.0, 6.0])
def test_replicas_follow_a_step_of_load_without_flapping(load_s: float) -> None:
    """A step from one request to 32 at a time, kept up, with room for eight on each of four workers."""
    arena = LedgerArena(Policy(replica_down_s=20.0), load_s=load_s)
    for number in range(4):
        arena.add(f"w{number}", {"a": 4})
    arena.promise(replicas("p", "a", 1, 4, target=8))
    arena.run(60)
    assert len(arena.loaded("a")) == 1
    unloads = sum(len(machine.unloads) for machine in arena.machines.values())
    began = arena.now
    _keep_running(arena, 32, load_s + 5.0)
    assert len(arena.loaded("a")) == 4, f"not within {arena.now - began:.1f} s"
    counts = _keep_running(arena, 32, 60.0)
    assert set(counts) == {4}, "none goes while it is needed"
    assert sum(len(machine.unloads) for machine in arena.machines.values()) == unloads
    arena.run(120)
    assert len(arena.loaded("a")) == 1
    assert sum(len(machine.unloads) for machine in arena.machines.values()) == unloads + 3
    assert not arena.failed


def _keep_running(arena: LedgerArena, count: int, seconds: float) -> list[int]:
    """As one request ends the next one comes. Returns how many replicas were loaded at each step."""
    end, counts = arena.now + seconds, []
    while arena.now < end:
        arena.ask("a", tokens=20, count=count - len(arena.core.state.requests))
        arena.run(0.5)
        counts.append(len(arena.loaded("a")))
    return counts
