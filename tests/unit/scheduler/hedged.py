"""Requests with two attempts, for the tests of hedges."""

from __future__ import annotations

from scheduler import events
from scheduler.policy import Policy
from scheduler.requests import LiveRequest
from tests.unit.scheduler.arena import Arena, make_request

EARNED = 20
"""Requests that earn one hedge."""


def fleet(workers: int = 3, blocks: int = 64, policy: Policy | None = None, *, earned: int = 10 * EARNED) -> Arena:
    arena = Arena(policy)
    for number in range(workers):
        arena.add_worker(f"w{number}", blocks)
    arena.connect()
    arena.advance(2.0)
    for _ in range(earned):
        arena.core.state.budget.accepted()
    return arena


def live_of(arena: Arena, request_id: str = "r") -> LiveRequest:
    return arena.core.state.requests[request_id]


def late(arena: Arena, request_id: str = "r", waited_s: float = 1.0) -> None:
    """The watch says that the first token is late."""
    attempt = live_of(arena, request_id).attempt
    assert attempt is not None
    arena.post(events.AttemptLate(request_id, attempt.term, attempt.number, waited_s, 0.5))


def hedged(arena: Arena, request_id: str = "r", **fields: object) -> tuple[str, str]:
    """A request with two attempts, both of which have reached their workers: where the first and the second run."""
    arena.submit(make_request(request_id, **fields))  # type: ignore[arg-type]
    arena.advance(1.0)
    late(arena, request_id)
    places = [attempt.worker_id for attempt in live_of(arena, request_id).running]
    assert len(set(places)) == 2
    for worker_id in places:
        arena.deliver_orders(worker_id)
    return places[0], places[1]


def counts(arena: Arena) -> dict[str, int]:
    found = arena.core.state.counters
    return {name.removeprefix("hedges_"): found[name] for name in found if name.startswith("hedge") and found[name]}


def serve(arena: Arena, worker_id: str, steps: int = 10) -> None:
    for _ in range(steps):
        arena.deliver_orders(worker_id)
        arena.step(worker_id)
    arena.deliver_output()
