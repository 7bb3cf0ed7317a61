"""What fits where, decided before anything is loaded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmos.internal.v1 import registry_pb2, requests_pb2
from llmos.v1 import fleet_pb2
from scheduler import commands, events
from scheduler.ledger import Allocation, Unfit, plan
from tests.unit.scheduler.arena import GIB, MODEL, VERSION, Arena


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
