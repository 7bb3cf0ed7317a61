"""A gateway that acknowledges nothing loses its stream; one that is slow, idle, or not looked at keeps it."""

from __future__ import annotations

from llmos.internal.v1 import request_pb2
from llmos.v1 import fleet_pb2
from scheduler.gateways import UNHEARD_S, GatewayStream
from scheduler.outflow import Outflow

STEP_S = 0.5


def streaming() -> GatewayStream:
    return GatewayStream(1, fleet_pb2.Node(id="g1"), Outflow())


def say(stream: GatewayStream, index: int) -> None:
    stream.outflow.add(request_pb2.Output(request_id="r", index=index, token_ids=[7]))
    assert stream.outflow.take() is not None


def given_up_after_s(stream: GatewayStream, begin: float, acknowledge_every_s: float = 0.0) -> float:
    """Looks at it twice a second; -1: it kept its stream for a minute."""
    for look in range(120):
        now = begin + look * STEP_S
        if acknowledge_every_s and look * STEP_S % acknowledge_every_s == 0:
            stream.outflow.acknowledge(stream.outflow.acknowledged + 1)
            say(stream, 100 + look)
        if stream.unheard(now):
            return now - begin
    return -1.0


def test_nothing_arrives() -> None:
    stream = streaming()
    assert not stream.unheard(99.5)
    say(stream, 0)
    assert given_up_after_s(stream, 100.0) == UNHEARD_S - STEP_S


def test_a_slow_gateway_is_heard() -> None:
    stream = streaming()
    say(stream, 0)
    say(stream, 1)
    assert given_up_after_s(stream, 100.0, acknowledge_every_s=8.0) == -1.0


def test_an_idle_gateway_has_nothing_to_acknowledge() -> None:
    assert given_up_after_s(streaming(), 100.0) == -1.0


def test_a_scheduler_that_stood_still_blames_nobody() -> None:
    stream = streaming()
    say(stream, 0)
    assert not stream.unheard(100.0)
    assert not stream.unheard(200.0)
    assert given_up_after_s(stream, 200.5) == UNHEARD_S - STEP_S
