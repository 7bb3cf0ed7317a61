"""Where requests go: to their prefix while that pays, to the fast, evenly among equals, never where they do not fit."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from llmos.internal.v1 import request_pb2, work_pb2
from scheduler import commands, events
from scheduler.pools import WorkerPool, step, top
from scheduler.requests import BLOCK_TOKENS
from tests.unit.scheduler.arena import MODEL, Arena, make_request


def prompt(request_id: str, prefix: Sequence[int], suffix: int = 40, **fields: object) -> request_pb2.Request:
    """A prompt of whole cached blocks and some tokens of its own."""
    return make_request(request_id, prompt=len(prefix) * BLOCK_TOKENS + suffix, prefix_hashes=list(prefix), **fields)


def fleet(workers: int, blocks: int = 4096) -> Arena:
    arena = Arena()
    arena.connect()
    for number in range(workers):
        arena.add_worker(f"w{number}", blocks=blocks)
    return arena


def caches(arena: Arena, worker_id: str, hashes: Sequence[int], number: int = 1) -> list[commands.Command]:
    change = work_pb2.CacheChange(model=MODEL, number=number, stored=hashes)
    return arena.post(events.WorkerFrame(worker_id, work_pb2.WorkFrame(cache=[change])))


def placed(arena: Arena) -> list[str]:
    return [command.worker_id for command in arena.commands if isinstance(command, commands.StartAttempt)]


PREFIX = range(100, 112)


def test_a_request_goes_to_its_prefix() -> None:
    arena = fleet(40)
    caches(arena, "w17", PREFIX)
    caches(arena, "w23", PREFIX[:6])
    arena.submit(prompt("r1", PREFIX))
    assert placed(arena) == ["w17"]


def test_a_hot_prefix_spreads_as_its_holder_saturates() -> None:
    arena = fleet(8)
    caches(arena, "w3", PREFIX)
    for number in range(192):
        arena.submit(prompt(f"r{number}", PREFIX))
    counts = Counter(placed(arena))
    assert placed(arena)[:4] == ["w3"] * 4, "waiting behind a few costs less than computing the prefix again"
    assert len(counts) == 8 and counts["w3"] < 60, counts
    assert min(counts.values()) >= 2


def test_a_burst_of_one_prefix_finds_itself() -> None:
    """Nobody has it yet: those that come later go where the first ones are going to cache it."""
    arena = fleet(8)
    for number in range(32):
        arena.submit(prompt(f"r{number}", PREFIX, suffix=1))
    ahead = sum(worker.load.ahead for worker in arena.core.state.workers.values())
    assert ahead <= 8 * len(PREFIX) * BLOCK_TOKENS + 32, "the prefix is computed at most once per worker"


def test_expectations_end_with_their_attempt() -> None:
    arena = fleet(2)
    arena.submit(prompt("r1", PREFIX))
    state = arena.core.state
    assert len(state.prefixes) == len(PREFIX)
    arena.cancel("r1")
    assert len(state.prefixes) == 0
    arena.submit(prompt("r2", PREFIX))
    arena.run()
    assert len(state.prefixes) == 0, "the worker never said that it cached anything"


def test_a_missed_change_is_asked_for_once() -> None:
    arena = fleet(1)
    caches(arena, "w0", [1], number=1)
    issued = caches(arena, "w0", [2], number=3) + caches(arena, "w0", [3], number=4)
    assert issued == [
        commands.Order("w0", work_pb2.Command(resend_cache=work_pb2.ResendCache(model=MODEL))),
    ]
    caches(arena, "w0", [1, 2, 3], number=1)
    assert len(arena.core.state.prefixes) == 3
    arena.detach("w0")
    assert len(arena.core.state.prefixes) == 0


def test_equals_share_evenly_over_time() -> None:
    """One at a time: nothing but noise and the tie-break decide, and nobody is favoured for lucky measurements."""
    arena, rng = fleet(8), random.Random(9)
    for number in range(400):
        arena.submit(make_request(f"r{number}", max_tokens=1))
        worker_id = placed(arena)[-1]
        arena.deliver_orders(worker_id)
        arena.now += 0.1 * rng.lognormvariate(0, 0.2)
        arena.step(worker_id)
        arena.deliver_output()
    counts = Counter(placed(arena))
    assert len(counts) == 8
    assert max(counts.values()) <= 3 * 400 / 8


def test_the_fast_get_more() -> None:
    arena = fleet(4)
    slow, fast = arena.core.state.workers["w0"], arena.core.state.workers["w1"]
    for number in range(100):
        slow.slots[MODEL].times.first_token.took(200, 0, 0, 0.8, arena.now + number / 100)
        fast.slots[MODEL].times.first_token.took(200, 0, 0, 0.1, arena.now + number / 100)
    for number in range(40):
        arena.submit(make_request(f"r{number}", prompt=200))
    counts = Counter(placed(arena))
    assert counts["w1"] >= 3 * counts["w0"]


def test_computing_a_prompt_costs_more_than_waiting_as_long() -> None:
    arena = fleet(2)
    caches(arena, "w1", PREFIX)
    worker, other = arena.core.state.workers["w1"], arena.core.state.workers["w0"]
    tokens = len(PREFIX) * BLOCK_TOKENS
    # A little longer in the holder's queue than the prefix takes to compute where nothing waits.
    worker.load.ahead = int(1.2 * tokens)
    for view in (worker, other):
        arena.core.state.room_changed(view, view.slots[MODEL])
    arena.submit(prompt("r1", PREFIX))
    assert placed(arena) == ["w1"]
    worker.load.ahead = 4 * tokens
    arena.core.state.room_changed(worker, worker.slots[MODEL])
    arena.submit(prompt("r2", PREFIX))
    assert placed(arena) == ["w1", "w0"]


def test_speed_is_learned_from_first_outputs() -> None:
    arena = fleet(1)
    times = arena.core.state.workers["w0"].slots[MODEL].times.first_token
    for number in range(20):
        arena.submit(make_request(f"r{number}", prompt=100, max_tokens=1))
        arena.deliver_orders("w0")
        arena.now += 0.3
        arena.step("w0")
    assert times.seen == 20
    assert 0.25 < times.seconds(100, 0, 0) < 0.35


def test_tenants_spread_where_nothing_else_differs() -> None:
    arena = fleet(2)
    workers = arena.core.state.workers
    for tenant in ("a", "a", "b", "b"):
        arena.submit(make_request(f"r{len(placed(arena))}", tenant=tenant))
    assert {worker.id: dict(worker.tenants) for worker in workers.values()} == {
        "w0": {"a": 1, "b": 1},
        "w1": {"a": 1, "b": 1},
    }


def test_a_large_request_is_placed_if_it_fits_anywhere() -> None:
    arena = fleet(300, blocks=4)
    arena.add_worker("large", blocks=400)
    arena.submit(make_request("r1", prompt=500, max_tokens=400))
    assert placed(arena) == ["large"]


def test_loads_add_up_to_nothing_in_the_end() -> None:
    arena = fleet(3, blocks=64)
    for number in range(20):
        arena.submit(prompt(f"r{number}", PREFIX[: number % 5], choices=1 + number % 2))
    arena.deliver_orders("w0")
    arena.step("w0")
    arena.kill("w0")
    arena.cancel("r3")
    arena.run()
    for worker in arena.core.state.workers.values():
        assert (worker.load.ahead, worker.load.prefilling, worker.load.decoding) == (0, 0, 0)
        assert not worker.tenants
    arena.check_idle()


def test_steps_are_fine_and_monotonic() -> None:
    steps = [step(number) for number in range(5000)]
    assert steps == sorted(steps)
    for number in range(5000):
        assert number <= top(step(number)) <= 1.25 * number + 1


def test_a_pool_names_the_least_loaded_and_the_roomiest() -> None:
    pool = WorkerPool()
    for number in range(100):
        pool.put(f"w{number:02}", load=10 * number, room=100 - number)
    assert set(pool.least_loaded(3, salt=7)) <= {f"w{number:02}" for number in range(3)}
    assert set(pool.roomiest(4, salt=7, room=90)) <= {f"w{number:02}" for number in range(16)}
    assert pool.roomiest(4, salt=7, room=200) == []
    pool.put("w50", load=0, room=500)
    assert "w50" in pool.least_loaded(2, salt=0) and pool.roomiest(1, salt=0, room=500) == ["w50"]
    assert pool.most_room >= 500
    for number in range(100):
        pool.discard(f"w{number:02}")
    assert len(pool) == 0 and pool.most_room == 0 and pool.draw(3, 1) == [] and pool.least_loaded(3, 1) == []
