"""How two attempts of one request end otherwise: with it, by the loss or failure of one, under a new leader."""

from __future__ import annotations

import pytest

from scheduler import commands, events
from scheduler.workers import OUT, TRIAL
from tests.unit.scheduler.arena import make_request
from tests.unit.scheduler.hedged import counts, fleet, hedged, late, live_of, serve

# -- ends


@pytest.mark.parametrize("how", ["cancel", "kill", "deadline", "gateway"])
def test_the_end_of_a_request_is_the_end_of_both(how: str) -> None:
    arena = fleet()
    places = hedged(arena, deadline_ms=5_000)
    if how == "cancel":
        arena.cancel("r")
    elif how == "kill":
        arena.post(events.Killed("r"))
    elif how == "deadline":
        arena.advance(6.0)
    else:
        arena.disconnect()
        arena.advance(2.0)
    for worker_id in places:
        arena.deliver_orders(worker_id)
        assert not arena.workers[worker_id].running
    assert counts(arena) == {"hedges": 1, "dropped": 1}
    arena.check_idle()


@pytest.mark.parametrize("lost", [0, 1])
def test_the_loss_of_one_worker_costs_nothing(lost: int) -> None:
    arena = fleet()
    places = hedged(arena)
    queued = len(arena.issued(commands.Queued))
    arena.kill(places[lost])
    live = live_of(arena)
    assert [one.worker_id for one in live.running] == [places[1 - lost]]
    assert len(arena.issued(commands.Queued)) == queued, "it does not wait again"
    arena.run()
    assert arena.gateways["g1"].clients["r"].finished == [True]
    assert counts(arena) == {"hedges": 1, "dropped" if lost else "stood_in": 1}
    arena.check_idle()


def test_the_loss_of_both_is_a_migration() -> None:
    arena = fleet()
    places = hedged(arena)
    for place in places:
        arena.kill(place)
    attempt = live_of(arena).attempt
    assert attempt is not None and attempt.worker_id not in places
    assert attempt.number == 3
    arena.run()
    assert arena.gateways["g1"].clients["r"].finished == [True]
    arena.check_idle()


@pytest.mark.parametrize("code", ["unavailable", "internal_error"])
@pytest.mark.parametrize("failing", [0, 1])
def test_the_failure_of_one_is_no_retry(failing: int, code: str) -> None:
    arena = fleet()
    arena.submit(make_request("r"))
    late(arena)
    places = [one.worker_id for one in live_of(arena).running]
    arena.workers[places[failing]].fail_next = [code]
    serve(arena, places[failing], 1)
    assert [one.worker_id for one in live_of(arena).running] == [places[1 - failing]]
    assert arena.core.state.counters["retries"] == 0
    arena.run()
    assert arena.gateways["g1"].clients["r"].finished == [True]
    arena.check_idle()


@pytest.mark.parametrize("failing", [0, 1])
def test_what_no_worker_does_ends_both(failing: int) -> None:
    arena = fleet()
    arena.submit(make_request("r"))
    late(arena)
    places = [one.worker_id for one in live_of(arena).running]
    arena.workers[places[failing]].fail_next = ["unsupported_feature"]
    serve(arena, places[failing], 1)
    arena.deliver_output()
    assert arena.gateways["g1"].clients["r"].error == "unsupported_feature"
    arena.deliver_orders(places[1 - failing])
    arena.check_idle()


def test_a_broken_contract_ends_one_of_them() -> None:
    arena = fleet()
    first, second = hedged(arena)
    arena.workers[first].skip_next = True
    arena.step(first)
    assert [one.worker_id for one in live_of(arena).running] == [second]
    arena.run()
    assert arena.gateways["g1"].clients["r"].finished == [True]
    arena.check_idle()


@pytest.mark.parametrize("drained", [0, 1])
def test_a_worker_that_empties_itself_hands_over_to_the_other_one(drained: int) -> None:
    arena = fleet()
    places = hedged(arena)
    arena.post(events.DrainOrdered(places[drained], undo=False))
    arena.advance(0.1)
    assert [one.worker_id for one in live_of(arena).running] == [places[1 - drained]]
    assert live_of(arena).attempts == 2
    arena.run()
    arena.check_idle()


@pytest.mark.parametrize(("stage", "stalled"), [("prefill", 0), ("prefill", 1), ("step", 0), ("step", 1)])
def test_one_that_stalls_leaves_the_other_one(stage: str, stalled: int) -> None:
    arena = fleet()
    places = hedged(arena)
    attempt = live_of(arena).running[stalled]
    arena.advance(5.0)
    if stage == "prefill":
        for worker_id in places:
            arena.workers[worker_id].stall_after = 0
            arena.step(worker_id)
    arena.post(events.AttemptStalled("r", attempt.term, attempt.number, stage, 5.0, 2.0))  # type: ignore[arg-type]
    assert [one.worker_id for one in live_of(arena).running] == [places[1 - stalled]]
    assert live_of(arena).attempts == 2
    assert places[stalled] in live_of(arena).avoid
    for worker in arena.workers.values():
        worker.stall_after = None
    arena.run()
    arena.check_idle()


def test_a_probe_that_loses_has_failed() -> None:
    arena = fleet(2)
    trial = arena.core.state.workers["w0"]
    trial.health.standing = TRIAL
    arena.core.state.on_trial.add("w0")
    arena.submit(make_request("r"))
    assert trial.health.probe == "r"
    late(arena)
    arena.deliver_orders("w1")
    arena.step("w1")
    assert trial.health.standing == OUT
    assert trial.health.failed_trials == 1


def test_a_change_of_class_reaches_both() -> None:
    arena = fleet()
    places = hedged(arena)
    arena.post(events.Reprioritized("r", 3))  # type: ignore[arg-type]
    for worker_id in places:
        arena.deliver_orders(worker_id)
        assert arena.workers[worker_id].running["r"].request.priority == 3
    arena.run()
    arena.check_idle()


# -- a new leader


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("early", [True, False], ids=["gateway first", "workers first"])
def test_new_leader_keeps_one_of_two(order: tuple[int, int], early: bool) -> None:
    arena = fleet()
    places = hedged(arena)
    arena.new_leader(9)
    if early:
        arena.connect()
    for number in order:
        arena.attach(places[number])
    third = next(iter(arena.workers.keys() - set(places)))
    arena.attach(third)
    if not early:
        arena.connect()
    arena.advance(2.0)
    live = live_of(arena)
    assert len(live.running) == 1
    for worker_id in arena.workers:
        arena.deliver_orders(worker_id)
    holders = [one.id for one in arena.workers.values() if "r" in one.running]
    assert holders == [live.running[0].worker_id]
    arena.run()
    client = arena.gateways["g1"].clients["r"]
    assert client.finished == [True] and len(client.tokens[0]) == 8
    arena.check_idle()


def test_new_leader_finds_both_after_one_has_won() -> None:
    """The order to stop the loser was lost with the leader."""
    arena = fleet(2)
    places = hedged(arena)
    arena.step(places[0])
    arena.deliver_output()
    arena.new_leader(9)
    for worker_id in places:
        arena.attach(worker_id)
    arena.connect()
    arena.run()
    client = arena.gateways["g1"].clients["r"]
    assert client.finished == [True] and len(client.tokens[0]) == 8
    assert not any(worker.running for worker in arena.workers.values())
    arena.check_idle()


# -- queries of death


def test_a_hedged_query_of_death_that_has_output_costs_two_engines() -> None:
    arena = fleet(4)
    for worker in arena.workers.values():
        worker.poison = 4999
    request = make_request("poison", max_tokens=40)
    request.token_ids.append(4999)
    arena.submit(request)
    late(arena, "poison")
    arena.run()
    assert arena.gateways["g1"].clients["poison"].error == "request_quarantined"
    assert sum(worker.deaths for worker in arena.workers.values()) == 2
    arena.check_idle()


@pytest.mark.parametrize("deadly", [True, False])
def test_two_ends_at_once_may_have_one_cause_from_outside(deadly: bool) -> None:
    """The third engine tells: it ends too, or the request is innocent."""
    arena = fleet(4)
    first, second = hedged(arena)
    frames = []
    for worker_id in (first, second):
        arena.workers[worker_id]._end_engine()
        frames.append(arena.workers[worker_id].step())
    arena.post(events.WorkerFrame(first, frames[0]))
    live = live_of(arena)
    assert live.suspect and [one.worker_id for one in live.running] == [second]
    assert arena.core.state.workers[second].suspect == "r"
    arena.post(events.WorkerFrame(second, frames[1]))
    assert live.suspect and live.attempt is not None and live.attempt.worker_id not in (first, second)
    third = live.attempt.worker_id
    if deadly:
        arena.deliver_orders(third)
        arena.workers[third]._end_engine()
    arena.run()
    client = arena.gateways["g1"].clients["r"]
    assert (client.error, client.finished) == (("request_quarantined", [False]) if deadly else ("", [True]))
    assert arena.core.state.counters["quarantined"] == deadly
    arena.check_idle()


def test_a_hedge_is_no_second_suspect_on_its_worker() -> None:
    arena = fleet()
    first, second = hedged(arena)
    arena.core.state.workers[second].suspect = "another"
    arena.workers[first]._end_engine()
    arena.post(events.WorkerFrame(first, arena.workers[first].step()))
    live = live_of(arena)
    assert live.suspect
    assert [one.worker_id for one in live.running] == [next(iter(arena.workers.keys() - {first, second}))]
    assert arena.core.state.workers[second].suspect == "another"
