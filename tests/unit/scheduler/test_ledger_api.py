"""What operators may promise, what is kept for whom, and what is answered to "why is this not running"."""

from __future__ import annotations

import pytest

from llmos.errors import Conflict, InvalidRequest, LlmosError, ModelNotFound, NotFound
from llmos.internal.v1 import request_pb2
from llmos.v1 import fleet_pb2
from scheduler import events
from scheduler.allocation.check import check
from scheduler.explain import explain, status
from tests.unit.scheduler.ledger_arena import GIB, LedgerArena, job, replicas

GUARANTEED = fleet_pb2.RESOURCE_CLASS_GUARANTEED


@pytest.fixture
def arena() -> LedgerArena:
    found = LedgerArena()
    found.add("w1", {"a": 4, "b": 7}, memory=16 * GIB)
    found.add("w2", {"a": 4}, memory=8 * GIB)
    found.run(4)
    return found


@pytest.mark.parametrize(
    ("wanted", "error", "words"),
    [
        (fleet_pb2.Allocation(name="x"), InvalidRequest, "model or for a job"),
        (replicas("bad name", "a"), InvalidRequest, "name"),
        (replicas("x" * 64, "a"), InvalidRequest, "name"),
        (replicas("x", ""), InvalidRequest, "Name the model"),
        (replicas("x", "nobody"), ModelNotFound, "the default pool holds a model 'nobody'"),
        (replicas("x", "a", 3, 2), InvalidRequest, "contradict"),
        (replicas("x", "a", 3), Conflict, "could never stand"),
        (replicas("x", "a", 20_000), InvalidRequest, "10000"),
        (replicas("x", "a", pinned=("w9",)), InvalidRequest, "w9"),
        (replicas("x", "a", pinned=("w1", "w1")), InvalidRequest, "twice"),
        (replicas("x", "a", 0, 1, pinned=("w1", "w2")), InvalidRequest, "more than"),
        (replicas("x", "a", reserved=(fleet_pb2.ReservedShare(percent=10),)), InvalidRequest, "names a tenant"),
        (replicas("x", "a", reserved=(fleet_pb2.ReservedShare(tenant="t"),)), InvalidRequest, "1 to 100"),
        (
            replicas("x", "a", reserved=(fleet_pb2.ReservedShare(tenant="t", percent=60),) * 2),
            InvalidRequest,
            "120 percent",
        ),
        (job("x", 17 * GIB), Conflict, "16.0 GiB"),
        (job("x", 1, cpu=5.0), Conflict, "processors"),
        (job("x", 0), InvalidRequest, "how much"),
    ],
)
def test_what_could_never_be_kept_is_refused(
    arena: LedgerArena, wanted: fleet_pb2.Allocation, error: type[LlmosError], words: str
) -> None:
    with pytest.raises(error, match=words):
        check(arena.core.state, wanted)


def test_guarantees_must_fit_together() -> None:
    arena = LedgerArena()
    arena.add("w1", {"a": 7, "b": 9}, memory=16 * GIB)
    arena.add("w2", {"a": 7}, memory=10 * GIB)
    arena.promise(replicas("first", "b", 1, 1, kind=GUARANTEED, pinned=("w1",)))
    with pytest.raises(Conflict, match="guaranteed"):
        check(arena.core.state, replicas("second", "a", 2, 2, kind=GUARANTEED, pinned=("w1", "w2")))
    with pytest.raises(Conflict, match="promised by 'first'"):
        check(arena.core.state, replicas("second", "b", 1, 1))
    check(arena.core.state, replicas("second", "a", 1, 1, kind=GUARANTEED, pinned=("w2",)))
    with pytest.raises(Conflict, match="the pool has"):
        check(arena.core.state, job("third", 16 * GIB, kind=GUARANTEED))


def test_a_pool_without_workers_may_be_promised(arena: LedgerArena) -> None:
    check(arena.core.state, replicas("x", "c", 1, 1, pool="gpus"))
    arena.promise(replicas("x", "c", 1, 1, pool="gpus"))
    found = status(arena.core.state, arena.promises["x"], arena.now)
    assert "no worker" in found.problem


def test_reserved_blocks_are_kept_for_their_tenant() -> None:
    arena = LedgerArena()
    arena.add("w1", {"a": 4}, memory=8 * GIB)
    share = fleet_pb2.ReservedShare(tenant="vip", percent=50)
    arena.promise(replicas("p", "a", 1, 1, reserved=(share,)))
    arena.run(5)
    total = arena.core.state.workers["w1"].slots["a"].total_blocks
    others = arena.ask("a", tokens=50, count=total // 2 + 4)
    arena.post(events.Tick())
    running = arena.core.state.workers["w1"].running
    assert len(running) == total // 2
    stuck = next(name for name in others if name not in running)
    answer = explain(arena.core.state, stuck, arena.now)
    assert any(found.code == "reserved" and "'p' keeps" in found.message for found in answer.findings)
    for number in range(total // 2):
        request = request_pb2.Request(
            request_id=f"v{number}", tenant="vip", model="a", max_tokens=50, choices=1, token_ids=[1] * 8
        )
        arena.post(events.Submitted(1, request))
    assert len(running) == total


def test_a_request_is_explained_with_numbers(arena: LedgerArena) -> None:
    (running,) = arena.ask("b", tokens=40)
    assert explain(arena.core.state, running, arena.now).verdict.startswith("It computes its prompt on w1")
    arena.run(0.5)
    assert "decodes on w1" in explain(arena.core.state, running, arena.now).verdict
    total = arena.core.state.workers["w1"].slots["b"].total_blocks
    arena.ask("b", tokens=40, count=total + 1)
    arena.now += 0.1
    (last,) = arena.ask("b", tokens=40)
    answer = explain(arena.core.state, last, arena.now)
    assert answer.kind == "request"
    assert "free KV blocks of b" in answer.verdict
    codes = {(found.subject, found.code): found.message for found in answer.findings}
    assert f"0 of {total} are free" in codes["w1", "no_room"]
    assert codes["queue", "behind_in_queue"].startswith("2 requests")


def test_a_model_is_explained_worker_by_worker(arena: LedgerArena) -> None:
    arena.promise(replicas("p", "b", 1, 1))
    arena.add("w3", {"b": 7}, memory=8 * GIB)
    arena.add("w4", {"b": 7, "a": 4}, memory=16 * GIB + 5)
    arena.lose("w2", for_good=False)
    arena.run(3)
    answer = explain(arena.core.state, "b", arena.now)
    codes = {found.subject: found.code for found in answer.findings}
    assert answer.verdict.startswith("It is loaded on 1 of the 3 workers that hold it. The allocation 'p' wants 1")
    assert codes["w1"] == "running"
    assert codes["w3"] == "unfit"
    assert codes["w4"] in ("no_room", "not_loaded")
    unfit = next(found for found in answer.findings if found.subject == "w3")
    assert "needs 9.0 GiB" in unfit.message
    assert "8.0 GiB" in unfit.message
    assert {f.code for f in explain(arena.core.state, "a", arena.now).findings if f.subject == "w2"} == {"lost"}


def test_an_allocation_that_does_not_stand_says_why(arena: LedgerArena) -> None:
    arena.promise(job("soak", 15 * GIB))
    arena.run(1)
    answer = explain(arena.core.state, "soak", arena.now)
    assert (answer.kind, answer.verdict) == ("allocation", "0 of 1 wanted the job stand.")
    assert "needs 15.0 GiB" in answer.findings[0].message
    assert status(arena.core.state, arena.promises["soak"], arena.now).problem.startswith("0 of 1 stand; w1: It needs")


def test_what_is_unknown_is_not_found(arena: LedgerArena) -> None:
    with pytest.raises(NotFound):
        explain(arena.core.state, "nobody", arena.now)


def test_a_draining_worker_is_named(arena: LedgerArena) -> None:
    arena.machines["w1"].draining = True
    arena.run(0.5)
    codes = {found.subject: found.code for found in explain(arena.core.state, "a", arena.now).findings}
    assert codes["w1"] == "draining"
