"""Requests for vectors, labels and scores: only to models that make them, and no block for an answer in tokens."""

from __future__ import annotations

import pytest

from llmos.internal.v1 import request_pb2, work_pb2
from llmos.v1 import inference_pb2
from scheduler import events
from scheduler.requests import blocks_needed
from tests.fakes.contract import SimWorker
from tests.unit.scheduler.arena import Arena, make_record, make_request

EMBED, SCORE, GENERATE = request_pb2.TASK_EMBED, request_pb2.TASK_SCORE, request_pb2.TASK_GENERATE


@pytest.fixture
def arena() -> Arena:
    arena = Arena()
    arena.connect()
    record = make_record("w1", context=128)
    record.models[0].model.capabilities.append("embed")
    arena.workers["w1"] = SimWorker("w1", 4)
    arena.post(events.WorkerRegistered(record))
    arena.attach("w1")
    arena.post(events.MembersListed())
    return arena


@pytest.mark.parametrize("task", [SCORE, GENERATE, request_pb2.TASK_UNSPECIFIED, request_pb2.TASK_CLASSIFY])
def test_a_model_is_asked_only_for_what_it_does(arena: Arena, task: request_pb2.Task.ValueType) -> None:
    client = arena.submit(make_request("r1", task=task))
    arena.deliver_output()
    assert client.error == "unsupported_feature"
    arena.check_idle()


def test_a_text_may_fill_the_whole_context(arena: Arena) -> None:
    whole = make_request("r1", prompt=128, max_tokens=1, task=EMBED)
    assert blocks_needed(whole, 1) == 2
    assert not arena.submit(whole).error
    client = arena.submit(make_request("r2", prompt=129, max_tokens=1, task=EMBED))
    arena.deliver_output()
    assert client.error == "context_length_exceeded"


def test_the_values_reach_the_gateway_and_end_the_request(arena: Arena) -> None:
    arena.submit(make_request("r1", prompt=5, max_tokens=1, task=EMBED))
    output = request_pb2.Output(
        request_id="r1",
        epoch=request_pb2.Epoch(term=7, attempt=1),
        values=[0.5, -1.0],
        finish_reason=inference_pb2.FINISH_REASON_STOP,
    )
    arena.post(events.WorkerFrame("w1", work_pb2.WorkFrame(sequence=1, outputs=[output])))
    sent = [message for message in arena.gateways["g1"].inbox if isinstance(message, request_pb2.Output)]
    assert [list(message.values) for message in sent] == [[0.5, -1.0]]
    assert not arena.core.state.requests
