"""The core's parts by themselves: blocks, pool, queue, ledger, catalogue, tombstones, timers, placement."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmos.internal.v1 import registry_pb2, request_pb2, requests_pb2
from llmos.v1 import fleet_pb2
from scheduler import commands, events
from scheduler.ledger import Allocation, Unfit, plan
from scheduler.recent import Recent
from scheduler.requests import Choice, LiveRequest, blocks_needed
from scheduler.timers import Timers
from scheduler.waiting import DrainRate, WaitingRoom
from scheduler.workers import ModelSlot, WorkerPool
from tests.unit.scheduler.arena import GIB, MODEL, VERSION, Arena, make_record, make_request


def live(request_id: str, now: float = 0.0, **fields: object) -> LiveRequest:
    return LiveRequest.accept(make_request(request_id, **fields), "g", 1, (MODEL, VERSION), now)


# -- blocks --


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
def test_pool_is_a_set(moves: list[tuple[bool, int]], count: int) -> None:
    pool, model = WorkerPool(), set[str]()
    for add, number in moves:
        (pool.add if add else pool.discard)(f"w{number}")
        (model.add if add else model.discard)(f"w{number}")
    drawn = pool.draw(count, "salt")
    assert len(pool) == len(model)
    assert set(drawn) <= model
    assert len(drawn) == len(set(drawn)) == min(count, len(model))


# -- queue --


def admitted(room: WaitingRoom) -> list[str]:
    order: list[str] = []

    def take(request: LiveRequest) -> bool:
        order.append(request.id)
        return True

    room.admit((MODEL, VERSION), take)
    return order


def test_interactive_goes_before_batch_and_batch_is_not_starved() -> None:
    room = WaitingRoom(16, 64)
    room.push(live("old-batch", now=0.0, priority=request_pb2.PRIORITY_CLASS_BATCH))
    room.push(live("standard", now=280.0))
    room.push(live("interactive", now=280.0, priority=request_pb2.PRIORITY_CLASS_INTERACTIVE))
    room.push(live("late", now=295.0, priority=request_pb2.PRIORITY_CLASS_INTERACTIVE))
    assert admitted(room) == ["interactive", "old-batch", "late", "standard"]


@given(st.lists(st.integers(0, 30), max_size=80))
def test_room_forgets_who_left(ids: list[int]) -> None:
    room, present = WaitingRoom(16, 64), dict[str, LiveRequest]()
    for number in ids:
        request_id = f"r{number}"
        if request_id in present:
            assert room.discard(present.pop(request_id))
        else:
            present[request_id] = live(request_id, now=float(number))
            room.push(present[request_id])
        assert len(room) == len(present)
        assert {request.id for request in room.waiting_for((MODEL, VERSION))} == set(present)
    assert admitted(room) == sorted(present, key=lambda request_id: int(request_id[1:]))
    assert not room.keys()


def test_retry_after_follows_the_drain_rate() -> None:
    slow, fast = DrainRate(), DrainRate()
    for second in range(60):
        slow.count(float(second), 1)
        fast.count(float(second), 50)
    assert fast.retry_after_ms(1000, 60.0) < slow.retry_after_ms(1000, 60.0) <= 60_000
    assert DrainRate().retry_after_ms(0, 0.0) == 1000


# -- ledger --


def gpu_record(memory: list[int], weights: list[int], kv: int = 0) -> registry_pb2.WorkerRecord:
    devices = [
        fleet_pb2.Device(id=f"gpu{i}", kind=fleet_pb2.DEVICE_KIND_GPU, memory_bytes=m) for i, m in enumerate(memory)
    ]
    models = [
        registry_pb2.ModelRecord(
            model=requests_pb2.CatalogueModel(name=f"m{i}", version="1", context_length=4096),
            weight_bytes=w,
            kv_bytes_per_token=kv,
            workspace_bytes=GIB,
        )
        for i, w in enumerate(weights)
    ]
    return registry_pb2.WorkerRecord(worker_id="w", capacity=fleet_pb2.Capacity(devices=devices), models=models)


def test_forty_gigabytes_do_not_go_on_a_card_of_twenty_four() -> None:
    (small,) = plan(gpu_record([24 * GIB], [40 * GIB]), 2048)
    (large,) = plan(gpu_record([80 * GIB], [40 * GIB]), 2048)
    assert isinstance(small, Unfit)
    assert "41.0 GiB" in small.reason
    assert large == Allocation("m0", "1", "gpu0", 80 * GIB)


def test_workspace_and_least_cache_count() -> None:
    assert isinstance(plan(gpu_record([24 * GIB], [23 * GIB]), 2048)[0], Allocation)
    assert isinstance(plan(gpu_record([24 * GIB], [23 * GIB], kv=1), 2048)[0], Unfit)


def test_models_share_what_is_left() -> None:
    one, two = plan(gpu_record([24 * GIB], [4 * GIB, 8 * GIB]), 2048)
    assert isinstance(one, Allocation)
    assert isinstance(two, Allocation)
    assert (one.budget_bytes, two.budget_bytes) == (10 * GIB, 14 * GIB)


def test_models_spread_over_devices() -> None:
    decisions = plan(gpu_record([24 * GIB, 24 * GIB], [10 * GIB, 10 * GIB]), 2048)
    assert {decision.device_id for decision in decisions if isinstance(decision, Allocation)} == {"gpu0", "gpu1"}


@given(
    st.lists(st.integers(0, 80 * GIB), max_size=4),
    st.lists(st.integers(0, 60 * GIB), max_size=6),
    st.integers(0, 10**5),
)
def test_no_device_is_promised_more_than_it_has(memory: list[int], weights: list[int], kv: int) -> None:
    record = gpu_record(memory, weights, kv)
    decisions = plan(record, 2048)
    assert sorted(decision.model for decision in decisions) == sorted(m.model.name for m in record.models)
    for device in record.capacity.devices:
        mine = [d for d in decisions if isinstance(d, Allocation) and d.device_id == device.id]
        assert sum(d.budget_bytes for d in mine) <= device.memory_bytes
    for decision in decisions:
        if isinstance(decision, Allocation):
            assert decision.budget_bytes >= weights[int(decision.model[1:])] + GIB


def test_load_is_ordered_once_and_unfit_never() -> None:
    arena = Arena()
    arena.connect()
    arena.add_worker("small", loaded=False, memory=GIB // 2)
    assert not arena.issued(commands.Order)
    assert arena.core.state.workers["small"].slots[MODEL].state == fleet_pb2.MODEL_STATE_UNFIT
    arena.add_worker("large", loaded=False)
    arena.step("large")
    (order,) = arena.issued(commands.Order)
    assert isinstance(order, commands.Order)
    assert order.worker_id == "large"
    assert order.command.load.memory_budget_bytes == 16 * GIB


def test_failed_load_is_not_repeated() -> None:
    arena = Arena()
    arena.add_worker("w1", loaded=False)
    failed = fleet_pb2.NodeModel(name=MODEL, version=VERSION, state=fleet_pb2.MODEL_STATE_FAILED, detail="no kernel")
    frame = arena.workers["w1"].step()
    del frame.models[:]
    frame.models.append(failed)
    arena.post(events.WorkerFrame("w1", frame))
    arena.advance(5)
    assert len(arena.issued(commands.Order)) == 1
    assert arena.core.state.workers["w1"].slots[MODEL].detail == "no kernel"


# -- catalogue, tombstones, timers, choices --


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


# -- placement --


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
    assert counts == [8] * 8


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
