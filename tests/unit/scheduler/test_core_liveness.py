"""Nothing waits for ever, blocks the others for ever, or is remembered for longer than it is needed."""

from __future__ import annotations

import pytest

from llmos.internal.v1 import request_pb2
from scheduler.policy import Policy
from scheduler.requests import Choice
from scheduler.timers import Timers
from tests.unit.scheduler.arena import Arena, make_request


def unequal(policy: Policy | None = None) -> Arena:
    """A request that only the large one of two workers can hold; the large one has just been lost."""
    arena = Arena(policy)
    arena.connect()
    arena.add_worker("large", blocks=64)
    arena.add_worker("small", blocks=2)
    arena.submit(make_request("big", max_tokens=640))
    arena.deliver_orders("large")
    arena.step("large")
    arena.deliver_output()
    arena.detach("large")
    return arena


def test_the_lost_last_words_of_an_attempt_are_missed() -> None:
    """No gap shows what was lost last; but the worker goes on saying that it has nothing to do."""
    arena = Arena(Policy(lost_attempt_s=5.0))
    arena.connect()
    worker = arena.add_worker("w1")
    client = arena.submit(make_request("r1", max_tokens=4))
    arena.deliver_orders("w1")
    for _ in range(3):
        arena.step("w1")
    worker.step()  # the frame with the last token and the end is lost
    assert not worker.running
    for _ in range(9):
        arena.advance(0.5)
        arena.step("w1")
    assert arena.core.state.counters["lost_attempts"] == 0
    arena.run()
    assert client.finished == [True]
    assert arena.core.state.counters["lost_attempts"] == 1
    arena.check_idle()


@pytest.mark.parametrize("lookahead", [1, 16])
def test_what_fits_on_no_connected_worker_holds_up_nobody(lookahead: int) -> None:
    arena = unequal(Policy(bypass_limit=2, lookahead=lookahead))
    small = [arena.submit(make_request(f"r{number}", max_tokens=3)) for number in range(8)]
    arena.run(60)
    assert all(not client.open for client in small)
    assert arena.gateways["g1"].clients["big"].open


def test_it_goes_on_as_soon_as_there_is_room_again() -> None:
    arena = unequal()
    arena.advance(5.0)
    arena.attach("large")
    assert arena.core.state.requests["big"].attempt is not None


def test_it_waits_no_longer_than_for_a_model_that_nobody_has() -> None:
    arena = unequal(Policy(no_worker_grace_s=10.0))
    for _ in range(8):
        arena.advance(1.0)
    assert "big" in arena.core.state.requests
    for _ in range(4):
        arena.advance(1.0)
    arena.deliver_output()
    assert arena.gateways["g1"].clients["big"].error == "unavailable"
    arena.check_idle()


def test_deadlines_of_ended_requests_are_forgotten() -> None:
    arena = Arena()
    arena.connect()
    arena.add_worker("w1", blocks=64)
    for number in range(500):
        arena.submit(make_request(f"r{number}", deadline_ms=3_600_000))
        arena.cancel(f"r{number}")
    arena.submit(make_request("last", deadline_ms=5_000))
    arena.advance(1.1)
    assert len(arena.core.state.timers) < 100
    arena.advance(5.0)
    arena.deliver_output()
    assert arena.gateways["g1"].clients["last"].error == "deadline_exceeded"


def test_timers_keep_their_order_when_some_are_dropped() -> None:
    timers: Timers = Timers()
    for number in (5, 3, 8, 1, 4):
        timers.at(float(number), number)  # type: ignore[arg-type]
    timers.drop(lambda event: event in {3, 8})  # type: ignore[comparison-overlap]
    assert list(timers.due(10.0)) == [1, 4, 5]  # type: ignore[comparison-overlap]


def test_a_last_word_without_tokens_loses_no_likelihoods() -> None:
    choice = Choice()
    entries = [request_pb2.LogprobEntry(token_id=number) for number in range(3)]
    choice.append([0, 1, 2], entries)
    choice.append([], [])
    assert choice.since(1) == ([1, 2], entries[1:])
    assert choice.since(3) == ([], [])


def test_an_id_that_is_used_again_and_again_may_still_move() -> None:
    arena = Arena(Policy(max_attempts=3))
    arena.connect()
    arena.add_worker("w1")
    for _ in range(4):
        client = arena.submit(make_request("same", max_tokens=3))
        arena.run(20)
        assert not client.open
    client = arena.submit(make_request("same", max_tokens=3))
    arena.deliver_orders("w1")
    arena.detach("w1")
    arena.attach("w1")
    arena.run(20)
    assert client.finished == [True]


def test_an_attempt_that_nobody_wants_is_stopped_where_it_still_runs() -> None:
    arena = Arena()
    arena.connect()
    arena.add_worker("w1")
    arena.submit(make_request("r1", max_tokens=50))
    arena.deliver_orders("w1")
    # The order to stop it is lost with a stream whose break the core has not heard of yet.
    arena.cancel("r1")
    arena.workers["w1"].inbox.clear()
    arena.step("w1")
    arena.deliver_orders("w1")
    assert not arena.workers["w1"].running
