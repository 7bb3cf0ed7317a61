"""A leader that begins while no worker is registered: leases ran out, or every worker is frozen."""

from __future__ import annotations

from llmos.internal.v1 import request_pb2
from llmos.v1 import fleet_pb2
from scheduler import events
from scheduler.commands import Command, SendFailure, StartAttempt
from scheduler.core import Core
from scheduler.policy import Policy
from tests.fakes.contract import SimWorker, make_record, make_request


def alone() -> tuple[Core, list[Command]]:
    """A leader with a gateway and without workers that has settled, and a request on it."""
    core = Core("s2", 9, Policy(), 0.0)
    core.handle(events.GatewayConnected(1, fleet_pb2.Node(id="g1")), 0.1)
    core.handle(events.MembersListed(), 0.1)
    core.handle(events.Tick(), 2.0)
    assert core.state.settled
    return core, core.handle(events.Submitted(1, request("r1")), 2.5)


def request(request_id: str) -> request_pb2.Request:
    return make_request(request_id, max_tokens=4)


def test_a_request_of_an_earlier_leader_is_not_refused_while_no_worker_has_come_back() -> None:
    core, out = alone()
    assert [command for command in out if isinstance(command, SendFailure)] == []
    core.handle(events.WorkerRegistered(make_record("w1")), 6.0)
    out = core.handle(events.WorkerAttached("w1", SimWorker("w1", 16).report()), 6.1)
    assert [command.request.request_id for command in out if isinstance(command, StartAttempt)] == ["r1"]


def test_it_ends_after_the_grace_if_nobody_comes() -> None:
    core, _ = alone()
    out: list[Command] = []
    for second in range(3, 70):
        out += core.handle(events.Tick(), float(second))
    codes = [command.failure.code for command in out if isinstance(command, SendFailure)]
    assert codes == ["unavailable"]
    assert core.state.requests == {}
