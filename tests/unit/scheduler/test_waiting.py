"""Who is next, and how long the queue takes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmos.internal.v1 import request_pb2
from scheduler.requests import LiveRequest
from scheduler.waiting import DrainRate, WaitingRoom
from tests.unit.scheduler.arena import MODEL, VERSION, make_request


def live(request_id: str, now: float = 0.0, **fields: object) -> LiveRequest:
    return LiveRequest.accept(make_request(request_id, **fields), "g", 1, (MODEL, VERSION), now)


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
