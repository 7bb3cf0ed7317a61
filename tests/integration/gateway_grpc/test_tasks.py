"""Vectors, labels and scores between the public gRPC API and a scripted scheduler."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from llmos.internal.v1 import request_pb2
from llmos.v1 import inference_pb2 as pb
from tests.fakes.scheduler import STOP, FakeScheduler, echo_model, output
from tests.integration.gateway_grpc.conftest import NewScheduler
from tests.integration.gateway_grpc.gateway import WAIT_S, running
from tests.integration.gateway_grpc.test_api import ALICE

MODELS = (
    echo_model("vectors", capabilities=["embed"], dimensions=[2], context_length=4),
    echo_model("classes", capabilities=["classify"], labels=["bad", "good"]),
    echo_model("ranker", capabilities=["score"], labels=["relevant"]),
)


def values(request: request_pb2.Request, *numbers: float, attempt: int = 1) -> request_pb2.Output:
    made = output(request.request_id, 0, epoch=(1, attempt), finish=STOP)
    made.values.extend(numbers)
    return made


def answer_all(scheduler: FakeScheduler, request: request_pb2.Request) -> None:
    size = len(request.token_ids)
    numbers = {request_pb2.TASK_EMBED: (size, 1.0), request_pb2.TASK_CLASSIFY: (0.25, 0.75)}
    scheduler.send(values(request, *numbers.get(request.task, (0.5,))))


async def test_each_text_is_a_request_of_its_own(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler(models=MODELS, answer=answer_all)
    async with running(address) as gateway:
        await gateway.ready()
        api = gateway.inference
        call = api.Embed(pb.EmbedRequest(model="vectors", inputs=["a", "bcd"]), metadata=ALICE, timeout=WAIT_S)
        embedded = await call
        assert [list(vector.values) for vector in embedded.embeddings] == [[1.0, 1.0], [3.0, 1.0]]
        assert embedded.usage.prompt_tokens == 4
        assert (await call.initial_metadata())["x-request-id"] == scheduler.submits[0].request_id
        labelled = await api.Classify(pb.ClassifyRequest(model="classes", inputs=["a"]), metadata=ALICE, timeout=WAIT_S)
        assert [(one.label, one.score) for one in labelled.classifications[0].labels] == [("good", 0.75), ("bad", 0.25)]
        asked = pb.ScoreRequest(model="ranker", query="who", texts=["you", "me"])
        assert list((await api.Score(asked, metadata=ALICE, timeout=WAIT_S)).scores) == [0.5, 0.5]
    first, pair = scheduler.submits[0], scheduler.submits[-1]
    assert (first.task, bytes(first.token_ids), first.max_tokens) == (request_pb2.TASK_EMBED, b"a", 1)
    assert not first.prefix_hashes
    assert (pair.task, bytes(pair.token_ids), pair.first_text_tokens) == (request_pb2.TASK_SCORE, b"whome", 3)


async def test_a_text_that_is_too_long_is_refused_and_the_others_are_cancelled(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler(models=MODELS)
    async with running(address) as gateway:
        await gateway.ready()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            asked = pb.EmbedRequest(model="vectors", inputs=["a", "abcde"])
            await gateway.inference.Embed(asked, metadata=ALICE, timeout=WAIT_S)
        said = dict(tuple(caught.value.trailing_metadata()))
        assert (said["llmos-error-code"], said["llmos-error-param"]) == ("context_length_exceeded", "input[1]")
        await scheduler.until(lambda: scheduler.cancels)
        assert scheduler.cancels[0].request_id == scheduler.submits[0].request_id


async def test_a_call_that_is_cancelled_takes_its_texts_with_it(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler(models=MODELS)
    async with running(address) as gateway:
        await gateway.ready()
        asked = pb.EmbedRequest(model="vectors", inputs=["a", "b", "c"])
        call = gateway.inference.Embed(asked, metadata=ALICE, timeout=WAIT_S)
        await scheduler.until(lambda: len(scheduler.submits) == 3)
        call.cancel()
        await scheduler.until(lambda: len(scheduler.cancels) == 3)
        names = {request.request_id for request in scheduler.submits}
        assert {cancel.request_id for cancel in scheduler.cancels} == names


@pytest.mark.parametrize("numbers", [(1.0,), (1.0, float("nan")), ()], ids=["too few", "no number", "none"])
async def test_damaged_values_are_asked_for_again(new_scheduler: NewScheduler, numbers: tuple[float, ...]) -> None:
    scheduler, address = await new_scheduler(models=MODELS)
    async with running(address) as gateway:
        await gateway.ready()
        asked = pb.EmbedRequest(model="vectors", inputs=["a"])
        call = asyncio.ensure_future(gateway.inference.Embed(asked, metadata=ALICE, timeout=WAIT_S))
        request = await scheduler.next_submit()
        scheduler.send(values(request, *numbers))
        again = await scheduler.next_submit()
        assert again.request_id == request.request_id
        scheduler.send(values(again, 1.0, 2.0, attempt=2))
        assert list((await call).embeddings[0].values) == [1.0, 2.0]
