"""The generated gRPC client against an echo fleet: chat, deadline, cancel, resume, and the same text as HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator

import grpc
import httpx
import pytest

from llmos.v1 import inference_pb2 as api
from llmos.v1.inference_pb2_grpc import InferenceStub
from tests.fakes.fleet import Fleet, echo_fleet, wait_for

USER = api.Message(role=api.ROLE_USER, content="Hello")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with echo_fleet(tmp_path_factory.mktemp("fleet"), worker=("--echo-tokens-per-second", "50")) as fleet:
        yield fleet


@pytest.fixture
def stub(fleet: Fleet) -> Iterator[InferenceStub]:
    with grpc.insecure_channel(fleet.grpc) as channel:
        yield InferenceStub(channel)


def request(tokens: int, seed: int = 7, **more: object) -> api.StreamChatRequest:
    params = api.GenerationParams(max_tokens=tokens, seed=seed)
    return api.StreamChatRequest(model="echo", messages=[USER], params=params, **more)  # type: ignore[arg-type]


def running(fleet: Fleet) -> list[str]:
    return [row["id"] for row in json.loads(fleet.cli("ps", "--json").stdout)]


def free_and_total(fleet: Fleet) -> tuple[int, int]:
    """KV blocks of the only worker's only model."""
    (worker,) = fleet.workers().values()
    (model,) = worker["models"]
    return model["free_blocks"], model["total_blocks"]


def test_whole_streamed_and_http_agree(fleet: Fleet, stub: InferenceStub) -> None:
    whole = stub.Chat(api.ChatRequest(model="echo", messages=[USER], params=request(20).params), timeout=20)
    events = list(stub.StreamChat(request(20), timeout=20))
    assert [event.WhichOneof("event") for event in (events[0], events[-1])] == ["start", "usage"]
    text = "".join(event.delta.text for event in events)
    body = {"model": "echo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20, "seed": 7}
    over_http = httpx.post(f"{fleet.http}/v1/chat/completions", json=body, timeout=20).json()
    assert text == whole.choices[0].text == over_http["choices"][0]["message"]["content"]
    assert whole.usage.completion_tokens == events[-1].usage.completion_tokens == 20


def test_a_deadline_ends_the_call_and_the_work(fleet: Fleet, stub: InferenceStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.StreamChat(request(5000), timeout=0.6))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
    wait_for(lambda: not running(fleet), "the request to be gone")


def test_cancelling_the_call_frees_the_worker(fleet: Fleet, stub: InferenceStub) -> None:
    call = stub.StreamChat(request(5000), timeout=30)
    start = next(call).start
    next(call)
    assert start.request_id
    call.cancel()
    wait_for(lambda: not running(fleet), "the request to be gone")
    wait_for(lambda: free_and_total(fleet)[0] == free_and_total(fleet)[1] > 0, "all blocks to be free again")


def test_cancel_by_id_ends_the_stream_typed(stub: InferenceStub) -> None:
    call = stub.StreamChat(request(5000), timeout=30)
    start = next(call).start
    assert stub.Cancel(api.CancelRequest(request_id=start.request_id), timeout=5).was_running
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() is grpc.StatusCode.CANCELLED  # type: ignore[attr-defined]
    assert not stub.Cancel(api.CancelRequest(request_id=start.request_id), timeout=5).was_running


@pytest.mark.parametrize("taken", [1, 17, 39])
def test_resume_continues_with_the_same_bytes(stub: InferenceStub, taken: int) -> None:
    whole = "".join(event.delta.text for event in stub.StreamChat(request(40), timeout=20))
    call = stub.StreamChat(request(40), timeout=20)
    start, text, tokens = next(call).start, "", list[int]()
    while len(tokens) < taken:
        delta = next(call).delta
        text += delta.text
        tokens.extend(delta.token_ids)
    call.cancel()
    held = api.ChoiceProgress(choice=0, token_ids=tokens, text_chars=len(text))
    resumed = request(40, seed=start.seed, resume=api.Resume(request_id=start.request_id, choices=[held]))
    events = [event.delta for event in stub.StreamChat(resumed, timeout=20) if event.WhichOneof("event") == "delta"]
    assert events[0].index == len(tokens)
    assert text + "".join(delta.text for delta in events) == whole


def test_errors_are_typed(stub: InferenceStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.Chat(api.ChatRequest(model="nope", messages=[USER]), timeout=5)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]
    assert dict(caught.value.trailing_metadata())["llmos-error-code"] == "model_not_found"  # type: ignore[attr-defined]
    with pytest.raises(grpc.RpcError) as caught:
        stub.Embed(api.EmbedRequest(model="echo", inputs=["x"]), timeout=5)
    assert dict(caught.value.trailing_metadata())["llmos-error-code"] == "unsupported_feature"  # type: ignore[attr-defined]


def test_models_are_listed(stub: InferenceStub) -> None:
    (model,) = stub.ListModels(api.ListModelsRequest(), timeout=5).models
    assert model.name == "echo"
    assert {"chat", "completion"} <= set(model.capabilities)
