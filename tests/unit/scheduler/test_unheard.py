"""Streams of gateways that end: nothing is acknowledged, or what comes cannot be read. Slow and idle ones go on."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

import pytest

from llmos.errors import DamagedMessage
from llmos.internal.v1 import request_pb2, requests_pb2
from llmos.v1 import fleet_pb2
from scheduler.core import Core
from scheduler.gateways import UNHEARD_S, GatewayDesk, GatewayStream
from scheduler.loop import Loop
from scheduler.outflow import Outflow
from scheduler.policy import Policy
from tests.fakes.clock import ManualClock
from tests.unit.scheduler.test_shell import Recorder

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


@pytest.mark.parametrize("error", [DamagedMessage("flipped"), RuntimeError("a bug")])
async def test_what_cannot_be_read_is_no_orderly_end(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    async def said() -> AsyncIterator[requests_pb2.ExchangeRequest]:
        yield requests_pb2.ExchangeRequest(ack=requests_pb2.Ack(sequence=1))
        raise error

    desk = GatewayDesk(lambda: requests_pb2.Welcome(term=1), lambda spans: None)
    loop = Loop(Core("s", 1, Policy(), 0.0), Recorder(), ManualClock())
    stream = desk.serve(requests_pb2.GatewayHello(node=fleet_pb2.Node(id="g1")), said(), loop)
    assert (await anext(stream)).HasField("welcome")
    with pytest.raises(type(error)):
        await anext(stream)
    assert [one.levelno for one in caplog.records if "stream of gateway g1 ends" in one.message] == [logging.WARNING]
