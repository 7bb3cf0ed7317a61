"""TLS between the services: who lacks the authority's certificate, a key, or the operator's role, is refused."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
import httpx
import pytest

from llmos.certs import Certificates, make_certificates
from llmos.internal.v1 import work_pb2
from llmos.internal.v1.work_pb2_grpc import WorkStub
from llmos.keys import add_key
from llmos.v1 import fleet_pb2, inference_pb2
from llmos.v1.fleet_pb2_grpc import FleetStub
from llmos.v1.inference_pb2_grpc import InferenceStub
from tests.fakes.certificates import service_tls, tls_flags
from tests.fakes.fleet import Fleet, Process, running_fleet, wait_for

BODY = {"model": "echo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}


@dataclass(frozen=True, slots=True)
class Secured:
    """A fleet whose services speak mutual TLS, and what its clients hold."""

    fleet: Fleet
    files: Certificates
    user_key: str
    operator_key: str

    @property
    def https(self) -> str:
        return self.fleet.http.replace("http://", "https://")

    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.files.ca))

    def channel(self, ca: Path | None = None) -> grpc.Channel:
        credentials = grpc.ssl_channel_credentials((ca or self.files.ca).read_bytes())
        return grpc.secure_channel(self.fleet.grpc, credentials)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    files = make_certificates(folder / "certs", [], 1, datetime.now(UTC))
    keys = folder / "keys.json"
    user = add_key(keys, "acme", role="user", priority="standard", now_unix_s=1)[0]
    operator = add_key(keys, "ops", role="operator", priority="standard", now_unix_s=1)[0]
    flags = tls_flags(service_tls(files))
    with running_fleet(folder) as fleet:
        with fleet.together():
            fleet.scheduler(*flags)
            fleet.worker("--backend", "echo", "--echo-tokens-per-second", "50", *flags)
            fleet.gateway("--keys-file", str(keys), *flags)
        secured = Secured(fleet, files, user, operator)
        wait_for(lambda: httpx.get(f"{secured.https}/ready", verify=secured.trust()).status_code == 200, "readiness")
        yield secured


def ask(secured: Secured, key: str | None, verify: ssl.SSLContext | None = None) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    url = f"{secured.https}/v1/chat/completions"
    return httpx.post(url, json=BODY, headers=headers, verify=verify or secured.trust(), timeout=20)


def test_with_authority_and_key_it_answers_on_both_wires(secured: Secured) -> None:
    assert ask(secured, secured.user_key).status_code == 200
    with secured.channel() as channel:
        request = inference_pb2.ChatRequest(model="echo")
        request.messages.add(role=inference_pb2.ROLE_USER, content="Hi")
        request.params.max_tokens = 4
        answer = InferenceStub(channel).Chat(request, timeout=20, metadata=bearer(secured.user_key))
        assert answer.usage.completion_tokens == 4


def bearer(key: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {key}")]


@pytest.mark.parametrize("key", [None, "wrong", "llmos-" + "0" * 40])
def test_without_a_known_key_it_refuses(secured: Secured, key: str | None) -> None:
    assert ask(secured, key).status_code == 401
    with secured.channel() as channel, pytest.raises(grpc.RpcError) as caught:
        FleetStub(channel).ListNodes(fleet_pb2.ListNodesRequest(), timeout=10, metadata=bearer(key) if key else [])
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]


def test_a_client_without_the_authority_cannot_connect(secured: Secured, tmp_path: Path) -> None:
    other = make_certificates(tmp_path / "other", [], 1, datetime.now(UTC))
    with pytest.raises(httpx.ConnectError):
        ask(secured, secured.user_key, ssl.create_default_context(cafile=str(other.ca)))
    with secured.channel(other.ca) as channel, pytest.raises(grpc.RpcError) as caught:
        FleetStub(channel).ListNodes(fleet_pb2.ListNodesRequest(), timeout=10, metadata=bearer(secured.user_key))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]


def scheduler_of(fleet: Fleet) -> Process:
    return next(process for process in fleet.processes if process.name.startswith("scheduler"))


def worker_of(fleet: Fleet) -> Process:
    return next(process for process in fleet.processes if process.name.startswith("worker"))


def test_services_refuse_peers_without_a_certificate_of_the_authority(secured: Secured) -> None:
    """Knowing the authority is not enough between services: a peer must show a certificate that it signed."""
    credentials = grpc.ssl_channel_credentials(secured.files.ca.read_bytes())
    for process in (worker_of(secured.fleet), scheduler_of(secured.fleet)):
        with grpc.secure_channel(f"127.0.0.1:{process.ready['port']}", credentials) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                list(WorkStub(channel).Attach(iter([work_pb2.AttachRequest(term=1)]), timeout=10))
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
        with grpc.insecure_channel(f"127.0.0.1:{process.ready['port']}") as channel:
            with pytest.raises(grpc.RpcError) as caught:
                list(WorkStub(channel).Attach(iter([work_pb2.AttachRequest(term=1)]), timeout=10))
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]


def test_only_an_operator_kills_another_tenants_request(secured: Secured) -> None:
    """A user's key of another tenant is refused, the operator's is not."""
    with secured.channel() as channel:
        request = inference_pb2.StreamChatRequest(model="echo")
        request.messages.add(role=inference_pb2.ROLE_USER, content="Hi")
        request.params.max_tokens = 4000
        call = InferenceStub(channel).StreamChat(request, timeout=60, metadata=bearer(secured.operator_key))
        name = next(call).start.request_id
        kill = fleet_pb2.KillRequestRequest(request_id=name)
        with pytest.raises(grpc.RpcError) as caught:
            FleetStub(channel).KillRequest(kill, timeout=10, metadata=bearer(secured.user_key))
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED  # type: ignore[attr-defined]
        next(call)
        call.cancel()
        call = InferenceStub(channel).StreamChat(request, timeout=60, metadata=bearer(secured.user_key))
        kill.request_id = next(call).start.request_id
        assert FleetStub(channel).KillRequest(kill, timeout=10, metadata=bearer(secured.operator_key)).was_running
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() is grpc.StatusCode.CANCELLED  # type: ignore[attr-defined]
