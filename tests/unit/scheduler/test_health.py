"""Breaker, ejection, probes and the budget of second tries, with two to four workers; on virtual time."""

from __future__ import annotations

import random

import pytest

from llmos.internal.v1 import registry_pb2, work_pb2
from llmos.v1 import fleet_pb2
from scheduler import commands, events, views
from scheduler.budget import RESERVE, WINDOW_S, Budget
from scheduler.health import SLOW, STRIKES
from scheduler.workers import OUT, TRIAL, WELL, WorkerView
from tests.unit.scheduler.arena import Arena, make_request

ME = registry_pb2.SchedulerRecord(scheduler_id="s1")


def fleet(workers: int = 2, blocks: int = 64) -> Arena:
    arena = Arena()
    for number in range(workers):
        arena.add_worker(f"w{number}", blocks)
    arena.connect()
    arena.advance(2.0)
    return arena


def view(arena: Arena, worker_id: str) -> WorkerView:
    return arena.core.state.workers[worker_id]


def told_slow(arena: Arena, worker_id: str, seconds: float = 2.0, *, known: bool = True) -> None:
    """What the watch says while that lasts."""
    for _ in range(round(seconds / 0.5)):
        arena.post(events.WorkerSlow(worker_id, 10.0, known))
        arena.advance(0.5)


def hangs(arena: Arena, request_id: str) -> None:
    """The watch says that the engine below a request stands still."""
    live = arena.core.state.requests[request_id]
    assert live.attempt is not None
    stall = events.AttemptStalled(request_id, live.attempt.term, live.attempt.number, "step", 3.0, 2.0)
    arena.advance(3.0)
    arena.post(stall)


def failing(arena: Arena, worker_id: str, times: int, code: str = "unavailable") -> None:
    """So many times, a worker answers all that it is sent with a failure."""
    worker = arena.workers[worker_id]
    for number in range(times):
        worker.fail_next = [code] * 8
        for burst in range(8):
            arena.submit(make_request(f"{code}-{number}-{burst}-{arena.now}", max_tokens=2))
        arena.run(40)
        arena.advance(0.3)
        worker.fail_next.clear()


# -- budget


def test_budget_is_a_tenth_of_requests_and_three_per_ten_seconds() -> None:
    rng, budget, now = random.Random(3), Budget(), 0.0
    accepted, paid = 0, []
    for _ in range(5000):
        now += rng.expovariate(20)
        if rng.random() < 0.5:
            accepted += 1
            budget.accepted()
        elif budget.take_hedge(now) if rng.random() < 0.3 else budget.take(now):
            paid.append(now)
    assert len(paid) <= 0.1 * accepted + RESERVE * (1 + now // WINDOW_S)
    assert len(paid) > 0.08 * accepted


def test_reserve_holds_in_every_window_and_says_when_to_return() -> None:
    budget = Budget()
    assert [budget.take(0.0), budget.take(1.0), budget.take(2.0), budget.take(3.0)] == [True, True, True, False]
    assert budget.wait_s(3.0) == pytest.approx(7.0)
    assert not budget.take(9.9)
    assert budget.take(10.0)
    assert budget.wait_s(10.0) == pytest.approx(1.0)


def test_retries_stay_within_the_budget_and_those_refused_are_told_when_to_come_back() -> None:
    arena = fleet(2)
    for worker in arena.workers.values():
        worker.fail_next = ["unavailable"] * 100
    clients = [arena.submit(make_request(f"r{i}", max_tokens=2)) for i in range(8)]
    arena.run(100)
    assert all(client.error == "unavailable" for client in clients)
    assert arena.core.state.counters["retries"] == RESERVE
    failures = [c.failure for c in arena.issued(commands.SendFailure) if isinstance(c, commands.SendFailure)]
    assert {failure.retry_after_ms > 5000 for failure in failures} == {True}


def test_stream_that_has_begun_waits_for_the_budget_instead_of_breaking() -> None:
    arena = fleet(2)
    for number in range(8):
        arena.submit(make_request(f"r{number}", max_tokens=30))
    for _ in range(3):
        for worker_id, worker in arena.workers.items():
            arena.deliver_orders(worker_id)
            arena.step(worker_id)
            worker.skip_next = True
    arena.run(600)
    clients = arena.gateways["g1"].clients.values()
    assert all(client.finished == [True] for client in clients)
    arena.check_idle()


# -- ejection


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_failing_worker_is_put_out_tried_and_taken_back(workers: int) -> None:
    arena = fleet(workers)
    state, bad = arena.core.state, view(arena, "w0")
    for _ in range(20):
        failing(arena, "w0", 1)
        if bad.health.standing == OUT:
            break
    assert bad.health.standing == OUT
    assert not bad.usable
    (shown,) = [one for one in views.nodes(state, [], ME) if one.state == fleet_pb2.NODE_STATE_EJECTED]
    assert shown.id == "w0" and "unavailable" in shown.ejection_detail
    assert sum(worker.usable for worker in state.workers.values()) == workers - 1
    arena.advance(1.1)
    assert bad.health.standing == TRIAL
    before = len(arena.workers["w0"].refused)
    client = arena.submit(make_request("probe", max_tokens=20))
    assert not bad.usable
    other = arena.submit(make_request("other", max_tokens=20))
    assert state.requests["probe"].attempt.worker_id == "w0"  # type: ignore[union-attr]
    assert state.requests["other"].attempt.worker_id != "w0"  # type: ignore[union-attr]
    arena.run()
    assert client.finished == other.finished == [True]
    assert bad.health.standing == WELL
    assert not any(one.ejection_detail for one in views.nodes(state, [], ME))
    assert len(arena.workers["w0"].refused) == before + 1
    arena.check_idle()


@pytest.mark.parametrize("code", ["unsound_output", "engine_lost"])
def test_a_worker_whose_model_fails_is_put_out_and_its_requests_end_elsewhere(code: str) -> None:
    """Logits that are no numbers fail an attempt with `unsound_output` (`worker/engine/engine.py`)."""
    arena = fleet(3)
    for _ in range(100):
        arena.core.state.budget.accepted()
    client = arena.submit(make_request("before", max_tokens=60))
    for _ in range(6):
        failing(arena, "w0", 1, code)
    assert view(arena, "w0").health.standing != WELL or arena.core.state.counters["ejections"]
    arena.run()
    assert client.finished == [True]


def test_a_worker_whose_messages_come_damaged_is_put_out() -> None:
    arena = fleet(3)
    for number in range(STRIKES):
        assert view(arena, "w0").health.standing == WELL
        arena.detach("w0", damaged=True)
        arena.attach("w0")
        arena.advance(1.0)
        assert arena.core.state.counters["damaged_streams"] == number + 1
    assert view(arena, "w0").health.standing in (OUT, TRIAL)
    assert arena.core.state.counters["ejections"] == 1


def test_failed_trial_doubles_the_pause() -> None:
    arena = fleet(2)
    bad = view(arena, "w0")
    for _ in range(100):
        arena.core.state.budget.accepted()
    while bad.health.standing != OUT:
        failing(arena, "w0", 1)
    pauses = [bad.health.pause_s]
    for number in range(3):
        arena.advance(bad.health.pause_s + 0.1)
        assert bad.health.standing == TRIAL
        arena.workers["w0"].fail_next.append("unavailable")
        client = arena.submit(make_request(f"probe{number}", max_tokens=2))
        arena.run()
        assert client.finished == [True], "the probe is served elsewhere"
        assert bad.health.standing == OUT
        pauses.append(bad.health.pause_s)
    assert pauses == [1.0, 2.0, 4.0, 8.0]


def test_last_worker_is_never_put_out() -> None:
    arena = fleet(1)
    failing(arena, "w0", 6)
    told_slow(arena, "w0")
    assert view(arena, "w0").usable
    assert arena.core.state.counters["kept_last"] >= 1


def test_two_bad_workers_of_two_leave_one() -> None:
    arena = fleet(2)
    view(arena, "w0").health.pause_s = 8.0
    told_slow(arena, "w0")
    told_slow(arena, "w1")
    assert [view(arena, worker_id).usable for worker_id in ("w0", "w1")].count(True) == 1


def test_worker_that_is_out_returns_when_the_last_other_one_dies() -> None:
    arena = fleet(2)
    told_slow(arena, "w0")
    client = arena.submit(make_request("r", max_tokens=5))
    arena.kill("w1")
    assert view(arena, "w0").usable
    arena.run()
    assert client.finished == [True]


def test_mistakes_of_clients_are_no_failures() -> None:
    arena = fleet(2)
    failing(arena, "w0", 12, "invalid_request")
    assert view(arena, "w0").health.strikes == 0
    assert view(arena, "w0").usable


def test_completed_stream_clears_failures() -> None:
    arena = fleet(2)
    bad = view(arena, "w0")
    failing(arena, "w0", 2)
    assert bad.health.strikes == 2
    for number in range(8):
        arena.submit(make_request(f"good{number}", max_tokens=2))
    arena.run()
    assert bad.health.strikes == 0
    assert bad.usable


def test_one_cause_counts_once() -> None:
    arena = fleet(2)
    arena.workers["w0"].fail_next = ["unavailable"] * 8
    for number in range(16):
        arena.submit(make_request(f"r{number}", max_tokens=4))
    arena.deliver_orders("w0")
    arena.step("w0")
    assert view(arena, "w0").health.strikes == 1


# -- slow workers


def test_slow_worker_is_emptied_tried_and_taken_back() -> None:
    arena = fleet(2)
    clients = [arena.submit(make_request(f"r{i}", max_tokens=400)) for i in range(8)]
    for _ in range(5):
        for worker_id in arena.workers:
            arena.deliver_orders(worker_id)
            arena.step(worker_id)
        arena.advance(0.01)
    slow = view(arena, "w0")
    assert slow.running
    told_slow(arena, "w0")
    assert slow.health.standing in (OUT, TRIAL)
    assert not slow.running, "what ran there has moved"
    arena.advance(1.0)
    assert slow.health.standing == TRIAL
    arena.deliver_output()
    arena.submit(make_request("probe", max_tokens=30))
    arena.run(700)
    assert slow.health.standing == WELL
    assert all(client.finished == [True] for client in clients)


def test_trial_at_a_slow_pace_fails() -> None:
    arena = fleet(2)
    told_slow(arena, "w0")
    arena.advance(1.0)
    client = arena.submit(make_request("probe", max_tokens=30))
    slow = view(arena, "w0")
    assert slow.health.probe == "probe"
    arena.deliver_orders("w0")
    for _ in range(10):
        arena.step("w0")
        arena.advance(3.0)
    assert slow.health.turn == 2
    assert slow.health.pause_s == 2.0
    arena.run()
    assert client.finished == [True]


def test_moment_of_slowness_is_none() -> None:
    arena = fleet(2)
    for _ in range(10):
        arena.post(events.WorkerSlow("w0", SLOW, usual_known=True))
        arena.advance(2.0)
    assert view(arena, "w0").usable


def test_worker_of_a_slower_kind_is_taken_for_what_it_is() -> None:
    arena = fleet(2)
    slow = view(arena, "w0")
    told_slow(arena, "w0", known=False)
    for number in range(3):
        arena.advance(slow.health.pause_s + 0.1)
        arena.submit(make_request(f"probe{number}", max_tokens=12))
        arena.deliver_orders("w0")
        for _ in range(10):
            arena.step("w0")
            arena.advance(3.0)
        arena.run()
    assert slow.usable
    told_slow(arena, "w0", known=False)
    assert slow.usable


def test_worker_that_was_slow_once_and_fails_now_is_not_taken_for_a_slow_kind() -> None:
    arena = fleet(2)
    bad = view(arena, "w0")
    told_slow(arena, "w0", known=False)
    state = arena.core.state
    for number in range(3):
        arena.advance(bad.health.pause_s + 0.1)
        assert bad.health.standing == TRIAL
        arena.workers["w0"].fail_next = ["internal"] * 3
        arena.submit(make_request(f"probe{number}", max_tokens=12))
        arena.run(2)
    assert not bad.health.slow_by_nature
    assert not bad.usable, "what fails its trials is not readmitted as slow by nature"
    assert state.counters["ejections"] >= 4


# -- hangs


def test_hung_engine_loses_everything_at_once_and_returns_by_a_trial() -> None:
    arena = fleet(3)
    clients = [arena.submit(make_request(f"r{i}", max_tokens=40)) for i in range(9)]
    for worker_id in arena.workers:
        arena.deliver_orders(worker_id)
        arena.step(worker_id)
    hung = view(arena, "w0")
    held = list(hung.running)
    assert held
    for worker_id in ("w1", "w2"):
        arena.step(worker_id)
    hangs(arena, held[0])
    assert not hung.running
    assert not hung.usable
    moved = [arena.core.state.requests[request_id] for request_id in held]
    assert all(live.attempt is not None and live.attempt.worker_id != "w0" for live in moved)
    arena.step("w0")
    assert hung.health.standing == TRIAL
    arena.run()
    assert all(client.finished == [True] for client in clients)


def test_engine_that_is_stuck_after_all_has_moved_away_is_put_out_until_it_steps() -> None:
    arena = fleet(2)
    stuck = view(arena, "w0")

    def says(step: int, *, busy: bool = True) -> None:
        arena.advance(0.5)
        arena.post(events.WorkerFrame("w0", work_pb2.WorkFrame(step=step, busy=busy)))

    for step in (1, 2, 3, 4, 5, 5, 5, 5, 5, 5):
        says(step)
    assert stuck.health.standing == WELL
    says(5)
    assert (stuck.health.standing, stuck.health.hung) == (OUT, True)
    assert arena.core.state.counters["hangs"] == 1
    says(6, busy=False)
    assert (stuck.health.standing, stuck.health.hung) == (TRIAL, False)


def test_stalled_request_waits_for_a_full_worker_rather_than_go_back() -> None:
    arena = fleet(2, blocks=2)
    arena.submit(make_request("other", max_tokens=60))
    arena.submit(make_request("victim", max_tokens=60))
    state = arena.core.state
    victim = state.requests["victim"]
    other = state.requests["other"]
    if victim.attempt is None or other.attempt is None:
        pytest.fail("both run")
    arena.submit(make_request("third", max_tokens=60))
    bad = victim.attempt.worker_id
    victim.avoid.add(bad)
    arena.detach(bad)
    arena.attach(bad)
    arena.run(400)
    assert victim.attempts >= 2 or victim.finished
    assert arena.gateways["g1"].clients["victim"].finished == [True]
