"""Classes of service over the public gRPC API, and changes of class that a gateway has to remember."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from gateway.types import Identity
from llmos.internal.v1 import request_pb2, requests_pb2
from llmos.v1 import fleet_pb2
from llmos.v1 import inference_pb2 as pb
from tests.fakes.scheduler import LENGTH, FakeScheduler, output, resumed
from tests.integration.gateway_grpc import gateway as gateways
from tests.integration.gateway_grpc.conftest import NewScheduler
from tests.integration.gateway_grpc.gateway import WAIT_S, collect, running, text_of
from tests.integration.gateway_grpc.test_api import call, refused

ANSWER = "Hello"
INTERACTIVE, STANDARD, BATCH = 1, 2, 3


def answer_all(scheduler: FakeScheduler, request: request_pb2.Request) -> None:
    """Send what is missing of ANSWER."""
    start = len(resumed(request))
    scheduler.send(output(request.request_id, start, ANSWER[start:], finish=LENGTH))


def answer_in_part(scheduler: FakeScheduler, request: request_pb2.Request) -> None:
    """Send a beginning of ANSWER."""
    scheduler.send(output(request.request_id, 0, ANSWER[:2]))


@pytest.mark.parametrize(
    ("own", "asked", "got"),
    [
        ("standard", fleet_pb2.PRIORITY_CLASS_UNSPECIFIED, STANDARD),
        ("standard", fleet_pb2.PRIORITY_CLASS_INTERACTIVE, STANDARD),
        ("standard", fleet_pb2.PRIORITY_CLASS_BATCH, BATCH),
        ("interactive", fleet_pb2.PRIORITY_CLASS_UNSPECIFIED, INTERACTIVE),
        ("batch", fleet_pb2.PRIORITY_CLASS_STANDARD, BATCH),
    ],
)
async def test_a_request_gets_the_class_that_it_asks_for_up_to_its_keys(
    new_scheduler: NewScheduler, monkeypatch: pytest.MonkeyPatch, own: Any, asked: Any, got: int
) -> None:
    monkeypatch.setitem(gateways.KEYS, "Bearer alice", Identity("alice", priority=own))
    scheduler, address = await new_scheduler(answer=answer_all)
    params = pb.GenerationParams(service_tier=asked, max_tokens=len(ANSWER))
    async with running(address) as gateway:
        await gateway.ready()
        whole = await call(gateway.inference.Complete, pb.CompleteRequest(model="echo", text="x", params=params))
        message = pb.Message(role=pb.ROLE_USER, content="x")
        stream = gateway.inference.StreamChat(
            pb.StreamChatRequest(model="echo", messages=[message], params=params),
            metadata=(("authorization", "Bearer alice"),),
            timeout=WAIT_S,
        )
        first, *_ = [event async for event in stream]
    assert [request.priority for request in scheduler.submits] == [got, got]
    assert (whole.service_tier, first.start.service_tier) == (got, got)


async def test_what_is_no_class_is_refused(new_scheduler: NewScheduler) -> None:
    _, address = await new_scheduler()
    async with running(address) as gateway:
        await gateway.ready()
        params = pb.GenerationParams(service_tier=9)  # type: ignore[arg-type]
        answer = await refused(gateway.inference.Complete, pb.CompleteRequest(model="echo", text="x", params=params))
    assert answer == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_request", "service_tier")


async def test_the_next_leader_gets_the_class_that_a_request_was_moved_to(new_scheduler: NewScheduler) -> None:
    first, first_address = await new_scheduler(term=1, answer=answer_in_part)
    second, second_address = await new_scheduler(term=2, leads=False, answer=answer_all)
    async with running(first_address, second_address) as gateway:
        await gateway.ready()
        moved, other = await gateway.chat("a", max_tokens=5), await gateway.chat("b", max_tokens=5)
        gone = requests_pb2.ClassChange(request_id="gone", priority=request_pb2.PRIORITY_CLASS_BATCH)
        change = requests_pb2.ClassChange(request_id=moved.inner_id, priority=request_pb2.PRIORITY_CLASS_BATCH)
        await first.until(lambda: len(first.submits) == 2)
        first.send(class_changes=[gone, change])
        await first.until(lambda: first.acknowledged == 3)
        second.leads = True
        first.resign(second_address)
        texts = [text_of(await collect(stream)) for stream in (moved, other)]
    assert texts == [ANSWER, ANSWER]
    classes = {request.request_id: request.priority for request in second.submits}
    assert classes == {moved.inner_id: BATCH, other.inner_id: STANDARD}
    assert all(len(resumed(request)) == 2 for request in second.submits)
