"""The public gRPC API, called as its users call it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from llmos.internal.v1 import request_pb2
from llmos.v1 import fleet_pb2
from llmos.v1 import inference_pb2 as pb
from tests.fakes.scheduler import LENGTH, STOP, FakeScheduler, echo_model, output, resumed
from tests.integration.gateway_grpc.conftest import NewScheduler
from tests.integration.gateway_grpc.gateway import WAIT_S, running

ALICE = (("authorization", "Bearer alice"),)
BOB = (("authorization", "Bearer bob"),)
OPERATOR = (("authorization", "Bearer ops"),)
ANSWER = "Hé llo"
CACHED = 2
HELLO = [pb.Message(role=pb.ROLE_USER, content="Hello")]


def answer_all(scheduler: FakeScheduler, request: request_pb2.Request) -> None:
    """Send what is missing of ANSWER, for each choice."""
    tokens = list(ANSWER.encode())
    for choice in range(request.choices):
        start = len(resumed(request, choice))
        logprobs = [
            request_pb2.LogprobEntry(token_id=token, logprob=-1, top_token_ids=[token], top_logprobs=[-1])
            for token in tokens[start:]
        ]
        wanted = logprobs if request.sampling.HasField("logprobs") else []
        piece = output(request.request_id, start, tokens[start:], choice=choice, finish=STOP, logprobs=wanted)
        piece.cached_tokens = 0 if choice else CACHED
        scheduler.send(piece)


async def call(method: Any, request: Any, metadata: Sequence[tuple[str, str]] = ALICE, **options: Any) -> Any:
    """A unary call."""
    return await method(request, metadata=metadata, timeout=WAIT_S, **options)


async def refused(method: Any, request: Any, metadata: Sequence[tuple[str, str]] = ALICE) -> tuple[Any, str, str]:
    """Status, error code and field of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        answer = method(request, metadata=metadata, timeout=WAIT_S)
        if hasattr(answer, "read"):
            async for _ in answer:
                pass
        else:
            await answer
    trailing = dict(tuple(caught.value.trailing_metadata()))
    return caught.value.code(), str(trailing["llmos-error-code"]), str(trailing.get("llmos-error-param", ""))


async def test_chat(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler(answer=answer_all)
    async with running(address) as gateway:
        await gateway.ready()
        request = pb.ChatRequest(
            model="echo",
            messages=[pb.Message(role=pb.ROLE_SYSTEM, content="Be brief."), *HELLO],
            params=pb.GenerationParams(n=2, seed=7, logprobs=1, max_tokens=50, temperature=0.5, logit_bias={65: 1}),
        )
        answer = await call(gateway.inference.Chat, request)
    assert [choice.text for choice in answer.choices] == [ANSWER, ANSWER]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].finish_reason == pb.FINISH_REASON_STOP
    assert bytes(answer.choices[0].token_ids) == ANSWER.encode()
    assert [entry.token_bytes for entry in answer.choices[0].logprobs] == [bytes((byte,)) for byte in ANSWER.encode()]
    assert (answer.model, answer.model_version, answer.seed) == ("echo", "v1", 7)
    prompt = b"system: Be brief.\nuser: Hello\nassistant: "
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 2 * len(ANSWER.encode()))
    assert answer.usage.cached_tokens == CACHED
    wire = scheduler.submits[0]
    assert bytes(wire.token_ids) == prompt
    assert (wire.tenant, wire.choices, wire.max_tokens, wire.model_version) == ("alice", 2, 50, "v1")
    assert (wire.sampling.seed, wire.sampling.temperature, dict(wire.sampling.logit_bias)) == (7, 0.5, {65: 1})


async def test_stream_chat(new_scheduler: NewScheduler) -> None:
    _, address = await new_scheduler(answer=answer_all)
    async with running(address) as gateway:
        await gateway.ready()
        stream = gateway.inference.StreamChat(
            pb.StreamChatRequest(model="echo", messages=HELLO), metadata=ALICE, timeout=WAIT_S
        )
        messages = [message async for message in stream]
        headers = dict(tuple(await stream.initial_metadata()))
    assert [message.WhichOneof("event") for message in messages] == ["start", "delta", "usage"]
    assert messages[0].start.request_id == headers["x-request-id"]
    assert messages[1].delta.text == ANSWER


@pytest.mark.parametrize("prompt", [{"text": "ab"}, {"token_ids": pb.TokenIds(ids=b"ab")}])
async def test_complete(new_scheduler: NewScheduler, prompt: dict[str, Any]) -> None:
    scheduler, address = await new_scheduler(answer=answer_all)
    async with running(address) as gateway:
        await gateway.ready()
        whole = await call(gateway.inference.Complete, pb.CompleteRequest(model="echo", **prompt))
        stream = gateway.inference.StreamComplete(
            pb.StreamCompleteRequest(model="echo", **prompt), metadata=ALICE, timeout=WAIT_S
        )
        text = "".join([message.delta.text async for message in stream])
    assert whole.choices[0].text == text == ANSWER
    assert bytes(scheduler.submits[0].token_ids) == b"ab"


async def test_the_clients_own_request_id_is_echoed(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler(answer=answer_all)
    async with running(address) as gateway:
        await gateway.ready()
        for metadata in (ALICE, BOB):
            answer = await call(
                gateway.inference.Chat,
                pb.ChatRequest(model="echo", messages=HELLO),
                (*metadata, ("x-request-id", "mine")),
            )
            assert answer.request_id == "mine"
    assert [request.request_id for request in scheduler.submits] == ["alice/mine", "bob/mine"]


async def test_the_clients_trace_is_the_parent(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler(answer=answer_all)
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    async with running(address) as gateway:
        await gateway.ready()
        metadata = (*ALICE, ("traceparent", f"00-{trace_id}-b7ad6b7169203331-01"))
        await call(gateway.inference.Chat, pb.ChatRequest(model="echo", messages=HELLO), metadata)
        await scheduler.until(lambda: any(span.name == "chat echo" for span in scheduler.spans))
    root = next(span for span in scheduler.spans if span.name == "chat echo")
    assert root.trace_id.hex() == trace_id
    assert root.parent_span_id.hex() == "b7ad6b7169203331"
    assert scheduler.submits[0].trace.traceparent.split("-")[1:3] == [trace_id, root.span_id.hex()]
    assert "Hello" not in str(root.attributes)


async def test_a_broken_stream_is_resumed_from_any_token(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler(answer=answer_all)
    tokens = list(ANSWER.encode())
    async with running(address) as gateway:
        await gateway.ready()
        for held in range(len(tokens) + 1):
            chars = len(bytes(tokens[:held]).decode(errors="ignore"))
            request = pb.StreamChatRequest(
                model="echo",
                messages=HELLO,
                params=pb.GenerationParams(seed=7, max_tokens=100),
                resume=pb.Resume(
                    request_id="req-before",
                    choices=[
                        pb.ChoiceProgress(
                            choice=0, token_ids=tokens[:held], text_chars=chars, finished=held == len(tokens)
                        )
                    ],
                ),
            )
            stream = gateway.inference.StreamChat(request, metadata=ALICE, timeout=WAIT_S)
            messages = [message async for message in stream]
            assert messages[0].start.request_id == "req-before"
            assert messages[0].start.seed == 7
            assert ANSWER[:chars] + "".join(message.delta.text for message in messages) == ANSWER
            assert messages[-1].usage.completion_tokens == len(tokens)
    names = [request.request_id for request in scheduler.submits]
    assert len(set(names)) == len(tokens)
    assert [resumed(request) for request in scheduler.submits] == [tokens[:held] for held in range(len(tokens))]


async def test_a_deadline_ends_the_call_and_the_computation(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler()
    async with running(address) as gateway:
        await gateway.ready()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.inference.Chat(pb.ChatRequest(model="echo", messages=HELLO), metadata=ALICE, timeout=0.3)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await scheduler.until(lambda: scheduler.cancels)
    assert 0 < scheduler.submits[0].deadline_ms <= 300


async def test_a_cancelled_call_ends_the_computation(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler()
    async with running(address) as gateway:
        await gateway.ready()
        stream = gateway.inference.StreamChat(
            pb.StreamChatRequest(model="echo", messages=HELLO), metadata=ALICE, timeout=WAIT_S
        )
        await stream.read()
        stream.cancel()
        await scheduler.until(lambda: scheduler.cancels)
        assert scheduler.cancels[0].request_id == scheduler.submits[0].request_id


async def test_cancel_ends_a_stream_of_the_same_tenant_only(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler()
    async with running(address) as gateway:
        await gateway.ready()
        stream = gateway.inference.StreamChat(
            pb.StreamChatRequest(model="echo", messages=HELLO), metadata=ALICE, timeout=WAIT_S
        )
        request = pb.CancelRequest(request_id=(await stream.read()).start.request_id)
        assert not (await call(gateway.inference.Cancel, request, BOB)).was_running
        assert (await call(gateway.inference.Cancel, request)).was_running
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert caught.value.code() is grpc.StatusCode.CANCELLED
        assert not (await call(gateway.inference.Cancel, request)).was_running
        await scheduler.until(lambda: scheduler.cancels)


async def test_cancel_reaches_a_request_of_another_gateway(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler()
    scheduler.running = [
        fleet_pb2.RequestInfo(request_id="bob/mine", tenant="bob"),
        fleet_pb2.RequestInfo(request_id="alice/mine~0123abcd", tenant="alice"),
    ]
    async with running(address) as gateway:
        await gateway.ready()
        assert not (await call(gateway.inference.Cancel, pb.CancelRequest(request_id="bob/mine"))).was_running
        assert (await call(gateway.inference.Cancel, pb.CancelRequest(request_id="mine"))).was_running
    assert scheduler.killed == ["alice/mine~0123abcd"]


async def test_errors_have_a_status_a_code_and_a_field(new_scheduler: NewScheduler) -> None:
    _, address = await new_scheduler(
        models=[echo_model(context_length=100), echo_model("quiet", capabilities=["embed"])]
    )
    invalid, missing = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
    async with running(address) as gateway:
        await gateway.ready()
        chat, complete = gateway.inference.Chat, gateway.inference.StreamComplete

        def ask(model: str = "echo", **params: Any) -> pb.ChatRequest:
            return pb.ChatRequest(model=model, messages=HELLO, params=pb.GenerationParams(**params))

        assert (await refused(chat, ask(), ()))[:2] == (grpc.StatusCode.UNAUTHENTICATED, "invalid_api_key")
        assert await refused(chat, ask("nope")) == (missing, "model_not_found", "model")
        assert await refused(chat, ask("quiet")) == (invalid, "unsupported_feature", "model")
        assert await refused(chat, ask(temperature=3)) == (invalid, "invalid_request", "temperature")
        assert await refused(chat, ask(temperature=float("nan"))) == (invalid, "invalid_request", "temperature")
        assert await refused(chat, ask(logit_bias={256: 1})) == (invalid, "invalid_request", "logit_bias")
        assert await refused(chat, ask(max_tokens=99)) == (invalid, "context_length_exceeded", "max_tokens")
        assert (await refused(chat, pb.ChatRequest(model="echo")))[2] == "messages"
        role = pb.ChatRequest(model="echo", messages=[pb.Message(content="x")])
        assert (await refused(chat, role))[2] == "messages[0].role"
        long = pb.StreamCompleteRequest(model="echo", text="x" * 101)
        assert await refused(complete, long) == (invalid, "context_length_exceeded", "prompt")
        assert (await refused(complete, pb.StreamCompleteRequest(model="echo")))[2] == "prompt"
        assert (await refused(chat, ask(), (*ALICE, ("x-request-id", "x" * 129))))[2] == "x-request-id"


async def test_a_request_id_in_use_is_refused(new_scheduler: NewScheduler) -> None:
    _, address = await new_scheduler()
    async with running(address) as gateway:
        await gateway.ready()
        metadata = (*ALICE, ("x-request-id", "mine"))
        request = pb.StreamChatRequest(model="echo", messages=HELLO)
        stream = gateway.inference.StreamChat(request, metadata=metadata, timeout=WAIT_S)
        await stream.read()
        status, code, _ = await refused(gateway.inference.StreamChat, request, metadata)
        assert (status, code) == (grpc.StatusCode.ALREADY_EXISTS, "conflict")
        stream.cancel()


async def test_what_a_model_does_not_do_is_said_so(new_scheduler: NewScheduler) -> None:
    _, address = await new_scheduler()
    async with running(address) as gateway:
        await gateway.ready()
        for method, asked in (
            ("Embed", pb.EmbedRequest(inputs=["a"])),
            ("Classify", pb.ClassifyRequest(inputs=["a"])),
            ("Score", pb.ScoreRequest(query="a", texts=["b"])),
        ):
            rpc = getattr(gateway.inference, method)
            for model, code in (("echo", "unsupported_feature"), ("nope", "model_not_found"), ("", "invalid_request")):
                asked.model = model
                assert (await refused(rpc, asked))[1] == code
            assert (await refused(rpc, type(asked)(model="echo")))[1] == "invalid_request"


async def test_models_are_listed_in_order(new_scheduler: NewScheduler) -> None:
    _, address = await new_scheduler(models=[echo_model("b"), echo_model("a", capabilities=["completion", "chat"])])
    async with running(address) as gateway:
        await gateway.ready()
        answer = await call(gateway.inference.ListModels, pb.ListModelsRequest())
    assert [model.name for model in answer.models] == ["a", "b"]
    assert list(answer.models[0].capabilities) == ["chat", "completion"]
    assert answer.models[0].context_length == 8192


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\x02\xff\xfe", b"\x0a\x7f"])
async def test_bytes_that_are_no_message_are_the_clients_error(new_scheduler: NewScheduler, data: bytes) -> None:
    _, address = await new_scheduler()
    async with running(address) as gateway:
        await gateway.ready()
        for rpc in (
            gateway.channel.unary_unary("/llmos.v1.Inference/Chat"),
            gateway.channel.unary_stream("/llmos.v1.Inference/StreamChat"),
        ):
            assert (await refused(rpc, data))[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_request")


async def test_reflection_names_the_services(new_scheduler: NewScheduler) -> None:
    _, address = await new_scheduler()
    async with running(address) as gateway:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(gateway.channel)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        async with asyncio.timeout(WAIT_S):
            answer = await anext(aiter(stub.ServerReflectionInfo(iter([ask]))))
    names = {service.name for service in answer.list_services_response.service}
    assert {"llmos.v1.Inference", "llmos.v1.Fleet", "grpc.health.v1.Health"} <= names


async def test_the_fleet_is_shown_to_any_key(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler(term=4)
    scheduler.running = [fleet_pb2.RequestInfo(request_id="r", tenant="bob")]
    scheduler.traces = {"alice/mine": [fleet_pb2.Span(name="chat echo")], "x": [fleet_pb2.Span(name="other")]}
    async with running(address) as gateway:
        await gateway.ready()
        nodes = await call(gateway.fleet.ListNodes, fleet_pb2.ListNodesRequest())
        requests = await call(gateway.fleet.ListRequests, fleet_pb2.ListRequestsRequest())
        mine = await call(gateway.fleet.GetTrace, fleet_pb2.GetTraceRequest(id="mine"))
        other = await call(gateway.fleet.GetTrace, fleet_pb2.GetTraceRequest(id="x"))
        unknown = await refused(gateway.fleet.GetTrace, fleet_pb2.GetTraceRequest(id="y"))
        nobody = await refused(gateway.fleet.ListNodes, fleet_pb2.ListNodesRequest(), ())
    assert ([node.id for node in nodes.nodes], nodes.term) == (["s4"], 4)
    assert [row.request_id for row in requests.requests] == ["r"]
    assert [span.name for span in (*mine.spans, *other.spans)] == ["chat echo", "other"]
    assert unknown[0] is grpc.StatusCode.NOT_FOUND
    assert nobody[0] is grpc.StatusCode.UNAUTHENTICATED


async def test_only_an_operator_kills_what_is_not_its_own(new_scheduler: NewScheduler) -> None:
    scheduler, address = await new_scheduler()
    scheduler.running = [
        fleet_pb2.RequestInfo(request_id="bob/mine", tenant="bob"),
        fleet_pb2.RequestInfo(request_id="alice/mine", tenant="alice"),
    ]
    async with running(address) as gateway:
        await gateway.ready()
        kill = gateway.fleet.KillRequest

        def ask(name: str) -> fleet_pb2.KillRequestRequest:
            return fleet_pb2.KillRequestRequest(request_id=name)

        assert (await refused(kill, ask("bob/mine")))[0] is grpc.StatusCode.PERMISSION_DENIED
        assert scheduler.killed == []
        assert (await call(kill, ask("mine"))).was_running
        assert (await call(kill, ask("bob/mine"), OPERATOR)).was_running
        assert not (await call(kill, ask("gone"), OPERATOR)).was_running
    assert scheduler.killed == ["alice/mine", "bob/mine"]


async def test_without_a_leader_the_fleet_is_unavailable(new_scheduler: NewScheduler) -> None:
    _, address = await new_scheduler(leads=False)
    async with running(address) as gateway:
        status, code, _ = await refused(gateway.fleet.ListNodes, fleet_pb2.ListNodesRequest())
        assert (status, code) == (grpc.StatusCode.UNAVAILABLE, "unavailable")
        chat = pb.ChatRequest(model="echo", messages=HELLO, params=pb.GenerationParams(max_tokens=1))
        assert (await refused(gateway.inference.Chat, chat))[0] is grpc.StatusCode.UNAVAILABLE


async def test_a_length_finish_is_told_from_a_stop(new_scheduler: NewScheduler) -> None:
    def answer(scheduler: FakeScheduler, request: request_pb2.Request) -> None:
        scheduler.send(output(request.request_id, 0, "ab", finish=LENGTH))

    _, address = await new_scheduler(answer=answer)
    async with running(address) as gateway:
        await gateway.ready()
        request = pb.CompleteRequest(model="echo", text="x", params=pb.GenerationParams(max_tokens=2))
        whole = await call(gateway.inference.Complete, request)
    assert whole.choices[0].finish_reason == pb.FINISH_REASON_LENGTH
