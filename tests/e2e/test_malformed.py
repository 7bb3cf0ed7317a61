"""Two hundred malformed requests over HTTP and gRPC: no 500, no hang, one verdict, and the service still answers."""

from __future__ import annotations

import http.client
import json
import math
import random
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest

from llmos.v1 import inference_pb2 as api
from llmos.v1.inference_pb2_grpc import InferenceStub
from tests.fakes.fleet import Fleet, echo_fleet

Body = dict[str, Any]
MESSAGE = {"role": "user", "content": "Hi"}
GOOD: Body = {"model": "echo", "messages": [MESSAGE], "max_tokens": 2}

OUT_OF_BOUNDS: dict[str, list[Any]] = {
    "max_tokens": [0, 2**31, 2**32 - 1],
    "temperature": [-0.1, 2.1, 1e30, math.nan, math.inf, -math.inf],
    "top_p": [0.0, -1.0, 1.01, math.nan],
    "min_p": [-0.1, 1.1, math.inf],
    "presence_penalty": [-2.1, 2.1, math.nan],
    "frequency_penalty": [-2.1, 2.1, -math.inf],
    "repetition_penalty": [0.0, -1.0, 10.5, math.nan],
    "n": [0, 17, 2**31],
    "stop": [[""], ["x" * 257], ["a", "b", "c", "d", "e"]],
    "stop_token_ids": [list(range(65))],
    "logit_bias": [{"1": 101.0}, {"1": -101.0}, {"1": math.nan}, {str(i): 1.0 for i in range(1025)}],
    "min_tokens": [3, 2**31],
}


def shared_cases() -> list[Body]:
    """Requests that both wires can express and both must refuse."""
    cases = [GOOD | {field: value} for field, values in OUT_OF_BOUNDS.items() for value in values]
    cases += [GOOD | {"model": name} for name in ("", "nope", "x" * 300, "\x00", "../../etc")]
    cases += [GOOD | {"messages": []}, GOOD | {"messages": [MESSAGE] * 1025}]
    cases += [GOOD | {"messages": [{"role": "user", "content": "x" * 20_000}]}]
    rng = random.Random(4)
    while len(cases) < 75:
        fields = rng.sample(sorted(OUT_OF_BOUNDS), 2)
        cases.append(GOOD | {field: rng.choice(OUT_OF_BOUNDS[field]) for field in fields})
    return cases


def deep(depth: int) -> bytes:
    return b'{"model":"echo","messages":' + b"[" * depth + b"]" * depth + b"}"


def with_field(field: str, value: Any) -> bytes:
    return json.dumps(GOOD | {field: value}).encode()


RAW_BODIES: list[bytes] = [
    b"", b"{", b"[]", b"null", b"3", b'"x"', b"{}", b"\xff\xfe", b'{"model": "\xff"}', b"{'model': 'echo'}",
    b'{"model":"echo"}', b'{"messages":[]}', b'{"model":"echo","messages":{}}', b'{"model":"echo","messages":[1]}',
    b'{"model":"echo","messages":[{}]}', b'{"model":"echo","messages":[{"role":"user"}]}',
    b'{"model":"echo","messages":[{"role":"pope","content":"x"}]}',
    b'{"model":"echo","messages":[{"role":"user","content":3}]}',
    b'{"model":"echo","messages":[{"role":"user","content":[{"type":"image_url"}]}]}',
    b'{"model":"echo","messages":[{"role":"user","content":"\\ud800"}]}',
    deep(100), deep(10_000), deep(100_000), b'{"a":' * 5000 + b"1" + b"}" * 5000,
    json.dumps(GOOD).encode() + b"x", json.dumps(GOOD).encode().replace(b"2", b"1e400"), b"\x00" * 100, b"A" * 100_000,
    *(with_field("max_tokens", v) for v in (-1, 1.5, "2", True, 10**40, [], {}, -(10**400 % 10**50))),
    *(with_field("temperature", v) for v in ("hot", [], {}, True, 10**50)),
    *(with_field("n", v) for v in (-1, "3", 1.5, 10**30)),
    *(with_field("seed", v) for v in (-(2**70), 2**70, "s", 1.5, [])),
    *(with_field("stop", v) for v in (3, {}, [1], [None], ["a"] * 100)),
    *(with_field("logit_bias", v) for v in ([], {"x": 1}, {"1": "a"}, {"-1": 1}, {"99999999999": 1}, 3)),
    *(with_field("logprobs", v) for v in ("yes", 3.5, [])),
    *(with_field("top_logprobs", v) for v in (-1, 21, "x", 2**40)),
    *(with_field("stream", v) for v in ("yes", 3, [])),
    *(with_field("stream_options", v) for v in ("yes", 3, {"include_usage": "maybe"})),
    *(with_field("response_format", v) for v in ({"type": "json_object"}, {"type": 3}, "json", [])),
    *(with_field("tools", v) for v in ([{"type": "function"}], "x")),
    *(with_field("model", v) for v in (3, None, [], {})),
    *(with_field(name, 1) for name in ("temprature", "max_token", "__proto__", "\u0000", "x" * 5000)),
    *(with_field("stop_token_ids", v) for v in ([-1], ["a"], [2**40], 3)),
    *(with_field("messages", v) for v in ("hi", None, [[MESSAGE]], [MESSAGE, None])),
]  # fmt: skip


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with echo_fleet(tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet


def assert_alive(fleet: Fleet) -> None:
    assert httpx.post(f"{fleet.http}/v1/chat/completions", json=GOOD, timeout=10).status_code == 200


def over_http(fleet: Fleet, body: Body) -> str:
    """The error code, or "ok"."""
    content = json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{fleet.http}/v1/chat/completions", content=content, headers=headers, timeout=10)
    return "ok" if answer.status_code == 200 else str(answer.json()["error"]["code"])


def as_protobuf(body: Body) -> api.ChatRequest:
    message = api.ChatRequest(model=body["model"])
    for turn in body["messages"]:
        message.messages.add(role=api.ROLE_USER, content=turn["content"])
    params = {key: value for key, value in body.items() if key not in ("model", "messages", "logit_bias")}
    message.params.MergeFrom(api.GenerationParams(**params))
    for token, value in body.get("logit_bias", {}).items():
        message.params.logit_bias[int(token)] = value
    return message


def over_grpc(stub: InferenceStub, body: Body) -> str:
    try:
        stub.Chat(as_protobuf(body), timeout=10)
    except grpc.RpcError as error:
        return dict(error.trailing_metadata())["llmos-error-code"]  # type: ignore[attr-defined]
    return "ok"


def test_both_wires_give_the_same_verdict(fleet: Fleet) -> None:
    with grpc.insecure_channel(fleet.grpc) as channel:
        stub = InferenceStub(channel)
        for body in shared_cases():
            http, rpc = over_http(fleet, body), over_grpc(stub, body)
            assert http == rpc != "ok", (str(body)[:300], http, rpc)
            assert http in ("invalid_request", "model_not_found", "context_length_exceeded"), (str(body)[:300], http)
    assert_alive(fleet)


def test_malformed_http_bodies_are_client_errors(fleet: Fleet) -> None:
    assert len(RAW_BODIES) + len(shared_cases()) * 2 >= 200
    headers = {"content-type": "application/json"}
    with httpx.Client(base_url=fleet.http, timeout=10) as client:
        for body in RAW_BODIES:
            answer = client.post("/v1/chat/completions", content=body, headers=headers)
            assert 400 <= answer.status_code < 500, (body[:200], answer.status_code, answer.text[:300])
            assert {"message", "type", "param", "code"} <= answer.json()["error"].keys()
    assert_alive(fleet)


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/v1/chat/completions", {}, 405),
        ("POST", "/v1/nothing", {}, 404),
        ("POST", "/v1/chat/completions", {"content-type": "text/plain"}, 415),
        ("POST", "/v1/chat/completions", {"x-request-id": "x" * 4000}, 400),
        ("POST", "/v1/chat/completions", {"x-request-timeout": "soon"}, 400),
        ("GET", "/v1/models/%00", {}, 404),
    ],
)
def test_malformed_http_frames(fleet: Fleet, method: str, path: str, headers: dict[str, str], status: int) -> None:
    content = None if method == "GET" else json.dumps(GOOD)
    base = {"content-type": "application/json"} if method == "POST" else {}
    answer = httpx.request(method, fleet.http + path, content=content, headers=base | headers, timeout=10)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]
    assert_alive(fleet)


def test_a_body_announced_too_large_is_refused_unread(fleet: Fleet) -> None:
    connection = http.client.HTTPConnection(fleet.http.removeprefix("http://"), timeout=10)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("content-type", "application/json")
    connection.putheader("content-length", "999999999999")
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 413
    assert json.loads(answer.read())["error"]["code"] == "payload_too_large"
    connection.close()


def test_malformed_grpc_frames(fleet: Fleet) -> None:
    with grpc.insecure_channel(fleet.grpc) as channel:
        rng = random.Random(11)
        call = channel.unary_unary("/llmos.v1.Inference/Chat")
        for size in [1, 2, 3, 10, 100, 1000, 100_000] * 3:
            with pytest.raises(grpc.RpcError) as caught:
                call(rng.randbytes(size), timeout=10)
            assert caught.value.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT)  # type: ignore[attr-defined]
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/llmos.v1.Inference/Nothing")(b"", timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]
    assert_alive(fleet)
