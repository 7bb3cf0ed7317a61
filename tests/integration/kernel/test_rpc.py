"""Servers and channels over real sockets: typed errors, health, reflection, mutual TLS."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from llmos.addresses import host_port
from llmos.config import TlsConfig
from llmos.errors import ConfigError, InternalError, Overloaded, Unavailable
from llmos.rpc import RpcServer, error_from_rpc, open_channel
from llmos.v1 import inference_pb2, inference_pb2_grpc
from tests.fakes.certificates import make_authority

NAME = "llmos.v1.Inference"


class Scripted(inference_pb2_grpc.InferenceServicer):
    """Fails as told: by an error, or by its model's name."""

    async def Chat(self, request: inference_pb2.ChatRequest, context: object) -> inference_pb2.ChatResponse:  # noqa: N802
        if request.model == "full":
            raise Overloaded("The queue is full.", retry_after_s=1.5, param="model")
        if request.model == "bug":
            raise ZeroDivisionError("secret path /etc")
        return inference_pb2.ChatResponse(model=request.model)

    async def StreamChat(  # noqa: N802
        self, request: inference_pb2.StreamChatRequest, context: object
    ) -> AsyncIterator[inference_pb2.StreamChatResponse]:
        yield inference_pb2.StreamChatResponse(delta=inference_pb2.Delta(text="a"))
        raise Overloaded("The queue is full.")


async def serve(tls: TlsConfig | None = None) -> RpcServer:
    server = RpcServer("127.0.0.1", 0, tls=tls)
    server.add(inference_pb2_grpc.add_InferenceServicer_to_server, Scripted(), NAME)
    await server.start()
    return server


async def chat(port: int, model: str, tls: TlsConfig | None = None) -> inference_pb2.ChatResponse:
    async with open_channel(f"127.0.0.1:{port}", tls) as channel:
        call: Awaitable[inference_pb2.ChatResponse] = inference_pb2_grpc.InferenceStub(channel).Chat(
            inference_pb2.ChatRequest(model=model), timeout=5
        )
        return await call


@pytest.fixture
async def server() -> AsyncIterator[RpcServer]:
    server = await serve()
    yield server
    await server.stop(0)


async def test_a_typed_error_crosses_the_wire(server: RpcServer) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await chat(server.port, "full")
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    error = error_from_rpc(caught.value)
    assert isinstance(error, Overloaded)
    assert (error.message, error.retry_after_s, error.param) == ("The queue is full.", 1.5, "model")


async def test_a_bug_shows_no_details(server: RpcServer) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await chat(server.port, "bug")
    assert "secret" not in (caught.value.details() or "")
    assert isinstance(error_from_rpc(caught.value), InternalError)


async def test_a_stream_delivers_then_fails_typed(server: RpcServer) -> None:
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        call = inference_pb2_grpc.InferenceStub(channel).StreamChat(inference_pb2.StreamChatRequest(), timeout=5)
        texts = []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            texts.extend([answer.delta.text async for answer in call])
            pytest.fail("the stream ended silently")
    assert isinstance(error_from_rpc(caught.value), Overloaded)


async def test_nobody_listening_is_unavailable() -> None:
    server = await serve()
    await server.stop(0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await chat(server.port, "m")
    assert isinstance(error_from_rpc(caught.value), Unavailable)


async def test_health_follows_set_serving_and_reflection_names_services(server: RpcServer) -> None:
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=NAME)
        assert (await health.Check(request, timeout=5)).status == health_pb2.HealthCheckResponse.SERVING
        await server.set_serving(False)
        assert (await health.Check(request, timeout=5)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        info = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5
        )
        answer = await info.read()
        assert NAME in {service.name for service in answer.list_services_response.service}


async def test_no_proxy_stands_between_services(server: RpcServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert (await chat(server.port, "m")).model == "m"


@pytest.mark.parametrize("host", ["::1", "[::1]"])
async def test_ipv6_loopback(host: str) -> None:
    if not has_ipv6():
        pytest.skip("this machine has no IPv6 loopback")
    server = RpcServer(host, 0)
    server.add(inference_pb2_grpc.add_InferenceServicer_to_server, Scripted(), NAME)
    try:
        address = host_port(host, await server.start())
        async with open_channel(address) as channel:
            answer = await inference_pb2_grpc.InferenceStub(channel).Chat(
                inference_pb2.ChatRequest(model="m"), timeout=5
            )
        assert answer.model == "m"
    finally:
        await server.stop(0)


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


async def test_a_taken_port_is_a_config_error(server: RpcServer) -> None:
    second = RpcServer("127.0.0.1", server.port)
    with pytest.raises(ConfigError, match="taken"):
        await second.start()


Refused = Callable[[TlsConfig, TlsConfig], TlsConfig | None]


@pytest.mark.parametrize(
    "client",
    [
        lambda own, other: TlsConfig(ca_file=own.ca_file),
        lambda own, other: other,
        lambda own, other: TlsConfig(own.ca_file, other.cert_file, other.key_file),
        lambda own, other: None,
    ],
    ids=["no certificate", "another authority", "a certificate of another authority", "plain text"],
)
async def test_mutual_tls_lets_in_only_its_own(tmp_path: Path, client: Refused) -> None:
    own = make_authority(tmp_path / "own")
    other = make_authority(tmp_path / "other")
    server = await serve(own)
    try:
        assert (await chat(server.port, "m", own)).model == "m"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await chat(server.port, "m", client(own, other))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        await server.stop(0)
