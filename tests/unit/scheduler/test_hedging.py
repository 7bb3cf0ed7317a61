"""A second attempt of a request whose first token is late: when it begins, who wins, what it costs."""

from __future__ import annotations

import itertools

import pytest

from scheduler import commands, events, views
from scheduler.policy import Policy
from scheduler.workers import OUT, TRIAL
from tests.unit.scheduler.arena import MODEL, Arena, make_request
from tests.unit.scheduler.hedged import EARNED, counts, fleet, hedged, late, live_of, serve

# -- the race


@pytest.mark.parametrize("winner", [0, 1])
def test_first_token_wins_and_the_loser_is_cancelled_at_once(winner: int) -> None:
    arena = fleet()
    places = hedged(arena)
    first, second = places[winner], places[1 - winner]
    client = arena.gateways["g1"].clients["r"]
    arena.step(first)
    assert len(live_of(arena).running) == 1
    assert not arena.core.state.workers[second].running, "its blocks are free"
    arena.deliver_orders(second)
    assert not arena.workers[second].running, "the worker was told in the same breath"
    serve(arena, first)
    assert client.finished == [True] and len(client.tokens[0]) == 8
    assert counts(arena) == {"hedges": 1, "won" if winner else "lost": 1}
    arena.check_idle()


@pytest.mark.parametrize("winner", [0, 1])
def test_late_output_of_the_loser_is_fenced(winner: int) -> None:
    arena = fleet()
    places = hedged(arena)
    arena.step(places[winner])
    arena.step(places[1 - winner])  # computed before the order to stop came
    assert arena.core.state.counters["stale_outputs"] == 1
    arena.deliver_output()  # the gateway asserts that each index comes once
    assert len(arena.gateways["g1"].clients["r"].tokens[0]) == 1
    arena.run()
    arena.check_idle()


def test_the_second_one_keeps_the_place_of_the_first_and_people_see_the_one_that_runs() -> None:
    arena = fleet()
    arena.submit(make_request("r"))
    first = live_of(arena).attempt
    assert first is not None
    first.owed = True
    late(arena)

    def shown() -> tuple[str, int]:
        (row,) = views.requests(arena.core.state, arena.now, 10)
        return row.worker, row.attempt

    second = live_of(arena).hedge
    assert second is not None and second.owed
    assert shown() == (first.worker_id, 1)
    serve(arena, second.worker_id, 1)
    assert shown() == (second.worker_id, 2)


def test_traces_hear_of_both_and_of_who_won() -> None:
    arena = fleet()
    _, second = hedged(arena)
    serve(arena, second)
    starts = [one for one in arena.issued(commands.StartAttempt) if isinstance(one, commands.StartAttempt)]
    assert starts[0].reason == ""
    assert starts[1].reason == "hedge: attempt 1 has no token after 1.00 s, bound 0.50 s"
    assert list(arena.issued(commands.FirstToken)) == [commands.FirstToken("r", 2, won=True)]
    lost, over = arena.issued(commands.AttemptOver)
    assert lost == commands.AttemptOver("r", 1, "hedge: attempt 2 had the first token", 0, lost=True, at_least=True)
    assert over == commands.AttemptOver("r", 2, "", 8)


def test_worker_that_lost_is_known_to_be_slower() -> None:
    """Only prefills that end well are measured otherwise: it would look faster the more often it loses."""
    arena = fleet()
    first, second = hedged(arena)
    times = arena.core.state.workers[first].slots[MODEL].times.first_token
    before = times.seconds(10, 0, 0)
    arena.advance(4.0)
    arena.step(second)
    assert times.seen == 1
    assert times.seconds(10, 0, 0) > before


def test_second_attempt_may_be_where_the_first_one_would_continue_otherwise() -> None:
    """Nothing has been produced: numerics do not bind it, and what it produces binds those that follow."""
    arena = fleet(2)
    arena.workers["w1"].numerics = "other"
    arena.detach("w1")
    arena.attach("w1")
    _, second = hedged(arena)
    arena.step(second)
    assert live_of(arena).fingerprint == arena.workers[second].numerics


# -- when there is none


def check_alone(arena: Arena, request_id: str = "r") -> None:
    assert live_of(arena, request_id).hedge is None
    assert not counts(arena)


@pytest.mark.parametrize(
    ("workers", "policy", "fields"),
    [
        (1, Policy(), {}),
        (3, Policy(hedge=False), {}),
        (3, Policy(), {"choices": 2}),
        (3, Policy(max_attempts=2), {}),
    ],
    ids=["one worker", "switched off", "two choices", "hardly an attempt left"],
)
def test_there_is_none(workers: int, policy: Policy, fields: dict[str, int]) -> None:
    arena = fleet(workers, policy=policy)
    arena.submit(make_request("r", **fields))
    late(arena)
    check_alone(arena)
    arena.run()
    arena.check_idle()


def test_there_is_none_after_the_first_token() -> None:
    arena = fleet()
    arena.submit(make_request("r"))
    attempt = live_of(arena).attempt
    assert attempt is not None
    serve(arena, attempt.worker_id, 1)
    late(arena)
    check_alone(arena)
    arena.kill(attempt.worker_id)
    late(arena)
    check_alone(arena)


def test_there_is_none_twice() -> None:
    arena = fleet()
    first, second = hedged(arena)
    arena.kill(second)
    late(arena)
    assert [one.worker_id for one in live_of(arena).running] == [first]
    assert counts(arena) == {"hedges": 1, "dropped": 1}


def test_an_attempt_that_is_over_is_not_late() -> None:
    arena = fleet()
    arena.submit(make_request("r"))
    attempt = live_of(arena).attempt
    assert attempt is not None
    arena.kill(attempt.worker_id)
    arena.post(events.AttemptLate("r", attempt.term, attempt.number, 1.0, 0.5))
    arena.post(events.AttemptLate("gone", 7, 1, 1.0, 0.5))
    check_alone(arena)


def test_nobody_waits_for_the_room_that_it_would_take() -> None:
    arena = fleet(2, blocks=4)
    clients = [arena.submit(make_request(f"r{number}")) for number in range(9)]
    assert len(arena.core.state.waiting) == 1
    for live in list(arena.core.state.requests.values()):
        if live.attempt is not None:
            late(arena, live.id)
    assert not counts(arena)
    arena.run()
    assert all(client.finished == [True] for client in clients)


def test_it_gives_way_to_whoever_comes() -> None:
    arena = fleet(2, blocks=2)
    first, second = hedged(arena)
    clients = [arena.submit(make_request(f"x{number}")) for number in range(3)]
    assert [one.worker_id for one in live_of(arena).running] == [first]
    assert not len(arena.core.state.waiting), "the last one has the hedge's place"
    assert counts(arena) == {"hedges": 1, "dropped": 1}
    arena.deliver_orders(second)  # which asserts that the worker is never sent more than it can hold
    arena.run()
    assert all(client.finished == [True] for client in clients)
    arena.check_idle()


def test_it_goes_to_no_worker_in_doubt() -> None:
    for doubt in (OUT, TRIAL):
        arena = fleet(2)
        arena.submit(make_request("r"))
        attempt = live_of(arena).attempt
        assert attempt is not None
        other = next(one for one in arena.core.state.workers.values() if one.id != attempt.worker_id)
        other.health.standing = doubt
        late(arena)
        check_alone(arena)


def test_it_goes_to_no_worker_that_was_tried() -> None:
    arena = fleet(2)
    arena.submit(make_request("r"))
    attempt = live_of(arena).attempt
    assert attempt is not None
    arena.workers[attempt.worker_id].fail_next = ["attempt_lost"]
    serve(arena, attempt.worker_id, 1)
    late(arena)
    check_alone(arena)
    arena.add_worker("fresh")
    late(arena)
    assert [one.worker_id for one in live_of(arena).running][1:] == ["fresh"]


def test_it_waits_until_the_other_worker_would_be_sooner() -> None:
    arena = fleet(2)
    for number in range(6):
        arena.submit(make_request(f"long{number}", prompt=900))
    arena.submit(make_request("r", prompt=900))
    late(arena, waited_s=0.2)
    check_alone(arena)
    late(arena, waited_s=20.0)
    assert live_of(arena).hedge is not None


def test_a_suspect_has_none() -> None:
    arena = fleet()
    arena.submit(make_request("r"))
    live_of(arena).suspect = True
    late(arena)
    check_alone(arena)


def test_a_request_that_was_taken_up_has_none() -> None:
    arena = fleet()
    request = make_request("r")
    arena.submit(request)
    request.resume.add(choice=0, finished=False)
    arena.new_leader(9)
    arena.connect()
    for worker_id in arena.workers:
        arena.attach(worker_id)
    arena.advance(2.0)
    late(arena)
    check_alone(arena)


# -- the budget


def test_one_request_in_twenty_has_one() -> None:
    arena = fleet(earned=0)
    numbers = itertools.count()
    for _ in range(300):
        request_id = f"r{next(numbers)}"
        arena.submit(make_request(request_id, max_tokens=1))
        late(arena, request_id)
        arena.run(4)
    assert counts(arena)["hedges"] == 300 // EARNED
    arena.check_idle()


def test_retries_and_hedges_share_what_requests_earn() -> None:
    arena = fleet(earned=EARNED)
    budget = arena.core.state.budget
    assert all(budget.take(arena.now) for _ in range(2)), "retries have spent it"
    arena.submit(make_request("r"))
    late(arena)
    check_alone(arena)
    assert budget.take(arena.now), "the reserve is for those in need"


# -- charges


@pytest.mark.parametrize("winner", [0, 1])
def test_prompt_is_charged_once_and_so_is_what_was_cached(winner: int) -> None:
    arena = fleet(policy=Policy(cached_cost=0.0))
    places = hedged(arena, prompt=100, max_tokens=4)
    account = live_of(arena).account
    assert account is not None
    assert account.virtual == 100
    for place in (places[winner], places[1 - winner]):
        frame = arena.workers[place].step()
        frame.outputs[0].cached_tokens = 64
        arena.post(events.WorkerFrame(place, frame))
    assert account.virtual == 100 - 64 + 1
    assert live_of(arena).cached_tokens == 64
    arena.run()
    assert account.virtual == 100 - 64 + 4
    arena.check_idle()
