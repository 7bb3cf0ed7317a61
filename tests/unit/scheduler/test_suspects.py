"""Queries of death: found after two engines, innocents never blamed, refused for a while; on virtual time."""

from __future__ import annotations

import random

import pytest

from llmos.internal.v1 import request_pb2, work_pb2
from scheduler import events
from scheduler.policy import Policy
from tests.unit.scheduler.arena import Arena, make_request

POISON = 4999


def fleet(workers: int, policy: Policy | None = None) -> Arena:
    arena = Arena(policy)
    for number in range(workers):
        arena.add_worker(f"w{number}", 64).poison = POISON
    arena.connect()
    arena.advance(2.0)
    return arena


def deadly(request_id: str = "poison", **fields: object) -> request_pb2.Request:
    request = make_request(request_id, max_tokens=40, **fields)
    request.token_ids.append(POISON)
    return request


def deaths(arena: Arena) -> int:
    return sum(worker.deaths for worker in arena.workers.values())


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_query_of_death_costs_two_engines_and_innocents_go_on(workers: int) -> None:
    arena = fleet(workers)
    innocents = [arena.submit(make_request(f"r{i}", max_tokens=40)) for i in range(7)]
    poison = arena.submit(deadly())
    arena.run(400)
    assert poison.error == "request_quarantined"
    assert deaths(arena) == 2
    assert all(client.finished == [True] for client in innocents)
    if workers > 1:
        assert all(worker.deaths <= 1 for worker in arena.workers.values()), "on two distinct workers"
    arena.check_idle()


@pytest.mark.parametrize("seed", range(12))
def test_innocents_are_never_blamed(seed: int) -> None:
    """Batches at random, poison anywhere in them: two engines each, and everybody else ends well."""
    rng = random.Random(seed)
    arena = fleet(rng.choice((1, 2, 3, 4)))
    count = rng.randint(2, 16)
    place = rng.randrange(count)
    clients = []
    for number in range(count):
        one = deadly() if number == place else make_request(f"r{number}", prompt=rng.randint(3, 90), max_tokens=40)
        clients.append(arena.submit(one))
        if rng.random() < 0.3:
            arena.run(rng.randint(1, 5))
    arena.run(900)
    errors = {client.request.request_id: client.error for client in clients if client.error}
    assert errors == {"poison": "request_quarantined"}
    assert deaths(arena) == 2
    assert all(client.finished == [True] for client in clients if not client.error)
    arena.check_idle()


@pytest.mark.parametrize("seed", [2, 5, 8, 13, 14])
def test_several_poisons_at_once_blame_nobody_else(seed: int) -> None:
    """The same deadly prompt more than once, or two different ones, among innocents, wherever they meet."""
    rng = random.Random(100 + seed)
    arena = fleet(rng.choice((1, 2, 3, 4)))
    same = rng.random() < 0.5
    deadly_ones = [deadly(f"poison{i}", prompt=5 if same else 5 + i) for i in range(2)]
    count = rng.randint(3, 14)
    places = rng.sample(range(count), 2)
    clients = []
    for number in range(count):
        known = number in places
        one = deadly_ones.pop() if known else make_request(f"r{number}", prompt=rng.randint(3, 90), max_tokens=40)
        clients.append(arena.submit(one))
        if rng.random() < 0.4:
            arena.run(rng.randint(1, 12))
    arena.run(1500)
    errors = {client.request.request_id: client.error for client in clients if client.error}
    assert errors == dict.fromkeys(("poison0", "poison1"), "request_quarantined")
    assert deaths(arena) <= 4
    assert all(client.finished == [True] for client in clients if not client.error)
    arena.check_idle()


def test_an_end_with_two_candidates_condemns_neither() -> None:
    """One worker's engine ends under an innocent that has died before and a prompt that has only just begun."""
    arena = fleet(1)
    arena.submit(make_request("innocent", prompt=20, max_tokens=60))
    arena.submit(make_request("fresh", prompt=30, max_tokens=60))
    arena.run(2)
    state = arena.core.state
    innocent = state.requests["innocent"]
    innocent.suspect, innocent.deaths, innocent.died_on = True, 1, {"elsewhere"}
    arena.workers["w0"]._end_engine()
    arena.run(1)
    assert not state.counters["quarantined"]
    assert all(state.requests[name].suspect for name in ("innocent", "fresh"))


def test_quarantine_is_the_tenants_own_and_expires() -> None:
    arena = fleet(2, Policy(quarantine_s=60.0))
    arena.submit(deadly())
    arena.run(300)
    again = arena.submit(deadly("again"))
    arena.deliver_output()
    assert again.error == "request_quarantined"
    assert deaths(arena) == 2, "it was not run"
    other = arena.submit(make_request("fine", max_tokens=4))
    arena.run()
    assert other.finished == [True]
    arena.submit(deadly("theirs", tenant="other"))
    assert "theirs" in arena.core.state.requests
    arena.cancel("theirs")
    arena.advance(61.0)
    arena.submit(deadly("later"))
    assert "later" in arena.core.state.requests


def test_no_worker_runs_two_suspects() -> None:
    arena = fleet(2)
    for number in range(8):
        arena.submit(make_request(f"r{number}", max_tokens=60))
    arena.submit(deadly())
    state = arena.core.state
    for _ in range(60):
        for worker_id in arena.workers:
            arena.deliver_orders(worker_id)
            arena.step(worker_id)
        arena.advance(0.02)
        for worker in state.workers.values():
            there = [state.requests[one] for one in worker.running]
            assert sum(live.suspect for live in there) <= 1
            assert worker.suspect == next((live.id for live in there if live.suspect), "")
    assert state.counters["suspected"] > 1


def test_worker_killed_once_makes_no_suspects() -> None:
    arena = fleet(2)
    clients = [arena.submit(make_request(f"r{i}", max_tokens=20)) for i in range(8)]
    arena.kill("w0")
    assert not any(live.suspect for live in arena.core.state.requests.values())
    arena.run()
    assert all(client.finished == [True] for client in clients)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_same_prompt_under_a_new_name_is_a_suspect_at_once(workers: int) -> None:
    for pause in range(4, 40, 4):
        arena = fleet(workers)
        clients = [arena.submit(make_request(f"r{i}", prompt=20 + i, max_tokens=60)) for i in range(7)]
        arena.submit(deadly("first"))
        arena.run(3 + pause)
        arena.submit(deadly("second"))
        arena.run(900)
        assert not any(client.error for client in clients), f"blamed after a pause of {pause}"


def lose_engine(arena: Arena, request_id: str, *, named: int = 1) -> None:
    """The engine below a request ends, of something else; its worker says so, perhaps more than once."""
    attempt = arena.core.state.requests[request_id].attempt
    assert attempt is not None
    arena.deliver_orders(attempt.worker_id)
    arena.workers[attempt.worker_id].running.clear()
    frame = work_pb2.WorkFrame(sequence=1, step=1)
    for _ in range(named):
        frame.failures.add(request_id=request_id, epoch=attempt.epoch, code="engine_lost")
    arena.post(events.WorkerFrame(attempt.worker_id, frame))


@pytest.mark.parametrize("max_tokens", [2, 20])
def test_who_ends_well_is_no_suspect_however_short_the_answer(max_tokens: int) -> None:
    arena = fleet(2)
    client = arena.submit(make_request("first", max_tokens=max_tokens))
    lose_engine(arena, "first")
    assert arena.core.state.requests["first"].suspect
    arena.run()
    assert client.finished == [True]
    arena.submit(make_request("second", max_tokens=max_tokens))
    assert not arena.core.state.requests["second"].suspect


def test_who_only_lacked_the_last_word_has_shown_nothing() -> None:
    arena = fleet(2)
    client = arena.submit(make_request("first", max_tokens=2))
    attempt = arena.core.state.requests["first"].attempt
    assert attempt is not None
    arena.deliver_orders(attempt.worker_id)
    output = arena.workers[attempt.worker_id].step()
    output.outputs.extend(arena.workers[attempt.worker_id].step().outputs)
    for one in output.outputs:
        one.finish_reason = 0  # type: ignore[assignment]
    arena.post(events.WorkerFrame(attempt.worker_id, output))
    lose_engine(arena, "first")
    arena.deliver_output()
    assert client.finished == [True]
    arena.submit(make_request("second", max_tokens=2))
    assert arena.core.state.requests["second"].suspect


def test_a_death_that_is_told_twice_is_one() -> None:
    arena = fleet(1)
    client = arena.submit(make_request("r"))
    lose_engine(arena, "r", named=2)
    assert arena.core.state.requests["r"].deaths == 1
    assert len(arena.core.state.waiting) + len(arena.core.state.requests["r"].running) == 1
    arena.run()
    assert client.finished == [True]
    arena.check_idle()
