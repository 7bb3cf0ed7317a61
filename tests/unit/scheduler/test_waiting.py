"""Who is next, and how long the queue takes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmos.internal.v1 import request_pb2
from scheduler import charges
from scheduler.forecast import DrainRate
from scheduler.policy import Policy
from scheduler.requests import LiveRequest
from scheduler.waiting import WaitingRoom
from tests.unit.scheduler.arena import MODEL, VERSION, make_request


def live(request_id: str, now: float = 0.0, **fields: object) -> LiveRequest:
    return LiveRequest.accept(make_request(request_id, **fields), "g", 1, (MODEL, VERSION), now)


def admitted(room: WaitingRoom) -> list[str]:
    order: list[str] = []

    def take(request: LiveRequest) -> bool:
        order.append(request.id)
        charges.started(request)
        return True

    room.admit((MODEL, VERSION), take)
    return order


def test_higher_classes_go_first() -> None:
    room = WaitingRoom(Policy())
    room.push(live("batch", priority=request_pb2.PRIORITY_CLASS_BATCH), 0.0)
    room.push(live("standard", now=280.0), 280.0)
    room.push(live("interactive", now=281.0, priority=request_pb2.PRIORITY_CLASS_INTERACTIVE), 281.0)
    room.push(live("late", now=295.0, priority=request_pb2.PRIORITY_CLASS_INTERACTIVE), 295.0)
    assert admitted(room) == ["interactive", "late", "standard", "batch"]


def test_inside_a_tenant_the_earliest_deadline_goes_first_then_arrival() -> None:
    room = WaitingRoom(Policy())
    for number, deadline_ms in enumerate((0, 9000, 0, 4000)):
        room.push(live(f"r{number}", now=float(number), deadline_ms=deadline_ms), float(number))
    assert admitted(room) == ["r3", "r1", "r0", "r2"]


def test_first_come_first_served_knows_neither_class_nor_tenant() -> None:
    room = WaitingRoom(Policy(order="fcfs"))
    for number, priority in enumerate((3, 1, 2)):
        room.push(live(f"r{number}", now=float(number), priority=priority, tenant=f"t{number}"), float(number))
    assert admitted(room) == ["r0", "r1", "r2"]


@given(st.lists(st.integers(0, 30), max_size=80))
def test_room_forgets_who_left(ids: list[int]) -> None:
    room, present = WaitingRoom(Policy()), dict[str, LiveRequest]()
    for number in ids:
        request_id = f"r{number}"
        if request_id in present:
            assert room.discard(present.pop(request_id))
        else:
            present[request_id] = live(request_id, now=float(number))
            room.push(present[request_id], float(number))
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
