"""KV blocks are never promised twice, and requests go where they run best."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmos.internal.v1 import registry_pb2
from scheduler import commands, events
from scheduler.pools import Bag
from scheduler.requests import blocks_needed
from scheduler.workers import ModelSlot
from tests.unit.scheduler.arena import MODEL, Arena, make_record, make_request


def test_blocks_round_up_per_choice() -> None:
    assert blocks_needed(make_request("r", prompt=60, max_tokens=4), 1) == 1
    assert blocks_needed(make_request("r", prompt=60, max_tokens=5), 3) == 6


def test_totals_bind_even_where_the_worker_says_that_much_is_free() -> None:
    slot = ModelSlot(registry_pb2.ModelRecord(), total_blocks=10, free_blocks=10, held=8)
    assert slot.fits(2, 0)
    assert not slot.fits(3, 0)


def test_free_blocks_bind_even_where_nothing_is_held() -> None:
    slot = ModelSlot(registry_pb2.ModelRecord(), total_blocks=10, free_blocks=4, promised=2)
    assert slot.fits(2, 0)
    assert not slot.fits(3, 0)
    assert slot.fits(3, 1)


def test_promises_last_until_the_worker_shows_the_attempt() -> None:
    arena = Arena()
    arena.connect()
    arena.add_worker("w1", blocks=4)
    slot = arena.core.state.workers["w1"].slots[MODEL]
    arena.submit(make_request("r1", max_tokens=100))
    assert (slot.held, slot.promised) == (2, 2)
    arena.step("w1")
    assert (slot.held, slot.promised) == (2, 2)
    arena.deliver_orders("w1")
    arena.step("w1")
    assert (slot.held, slot.promised) == (2, 0)


def test_an_earlier_attempt_on_the_same_worker_is_fenced() -> None:
    arena = Arena()
    arena.connect()
    arena.add_worker("w1")
    arena.submit(make_request("r1", max_tokens=50))
    arena.deliver_orders("w1")
    stale = arena.workers["w1"].step()
    arena.detach("w1")
    arena.attach("w1")
    assert arena.core.state.requests["r1"].attempts == 2
    arena.post(events.WorkerFrame("w1", stale))
    assert arena.core.state.counters["stale_outputs"] == 1
    assert arena.core.state.requests["r1"].tokens_out == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=60), st.integers(1, 5))
def test_bag_is_a_set(moves: list[tuple[bool, int]], count: int) -> None:
    pool, model = Bag(), set[str]()
    for add, number in moves:
        (pool.add if add else pool.discard)(f"w{number}")
        (model.add if add else model.discard)(f"w{number}")
    drawn = pool.draw(count, 12345)
    assert len(pool) == len(model)
    assert set(drawn) <= model
    assert len(drawn) == len(set(drawn)) == min(count, len(model))


def started_on(arena: Arena) -> list[str]:
    return [command.worker_id for command in arena.commands if isinstance(command, commands.StartAttempt)]


def test_equal_workers_share_the_load() -> None:
    arena = Arena()
    arena.connect()
    for number in range(8):
        arena.add_worker(f"w{number}")
    for number in range(64):
        arena.submit(make_request(f"r{number}"))
    counts = [started_on(arena).count(f"w{number}") for number in range(8)]
    assert min(counts) >= 7 and max(counts) <= 9


def test_same_numerics_are_preferred_for_a_resume() -> None:
    arena = Arena()
    arena.connect()
    arena.add_worker("w1", blocks=8)
    arena.submit(make_request("r1", max_tokens=50))
    arena.deliver_orders("w1")
    arena.step("w1")
    arena.add_worker("same", blocks=8)
    arena.post(events.WorkerRegistered(make_record("other")))
    report = arena.workers["same"].report()
    report.numerics_fingerprint = "another"
    report.models[0].total_blocks = report.models[0].free_blocks = 999
    arena.post(events.WorkerAttached("other", report))
    arena.kill("w1")
    assert started_on(arena) == ["w1", "same"]


def test_full_fleet_of_many_takes_what_fits_nowhere_else() -> None:
    arena = Arena()
    arena.connect()
    for number in range(40):
        arena.add_worker(f"w{number}", blocks=1)
    for number in range(41):
        arena.submit(make_request(f"r{number}"))
    assert sorted(started_on(arena)) == sorted(f"w{number}" for number in range(40))
