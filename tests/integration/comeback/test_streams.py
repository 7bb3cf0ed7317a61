"""Clients come back to broken streams: at another gateway, after a kill, at any offset, and only to their own."""

from __future__ import annotations

import asyncio
import os
import random
import re
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import httpx
import pytest

from llmos.rpc import error_from_rpc, open_channel
from llmos.v1 import inference_pb2 as pb
from llmos.v1 import inference_pb2_grpc
from tests.fakes.comeback import Reader
from tests.fakes.fleet import Fleet, Process, running_fleet

TOKENS = 60


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("comeback")
    key_file = folder / "gateways.key"
    key_file.write_text(f"{secrets.token_hex(32)}\n")
    with running_fleet(folder) as fleet:
        with fleet.together():
            fleet.scheduler()
            fleet.worker("--backend", "echo", "--echo-tokens-per-second", "250")
            for _ in range(3):
                fleet.gateway("--stream-key-file", str(key_file))
        fleet.wait_ready()
        yield fleet


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=30, verify=False) as client:
        yield client


def url(gateway: Process) -> str:
    return f"http://127.0.0.1:{gateway.ready['http_port']}"


def urls(fleet: Fleet) -> list[str]:
    return [url(gateway) for gateway in fleet.gateways() if gateway.popen.poll() is None]


def body(**fields: Any) -> dict[str, Any]:
    return {
        "model": "echo", "prompt": "once upon a time", "max_tokens": TOKENS, "seed": 7,
        "stream_options": {"include_usage": True}, **fields,
    }  # fmt: skip


CHAT = {
    "model": "echo", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 24, "seed": 5, "n": 2,
    "logprobs": True, "top_logprobs": 1, "service_tier": "default",
}  # fmt: skip
SHAPES = {
    "plain": body(),
    "choices": body(n=3, max_tokens=24),
    "logprobs": body(logprobs=2, max_tokens=30),
    "stop": body(stop=["zz", "q"], seed=11),
    "chat": CHAT,
}


@pytest.mark.parametrize("name", SHAPES)
async def test_a_stream_goes_on_elsewhere_at_any_offset(fleet: Fleet, http: httpx.AsyncClient, name: str) -> None:
    rng = random.Random(name)
    route = "/v1/chat/completions" if name == "chat" else "/v1/completions"
    undisturbed = Reader(SHAPES[name], route)
    await undisturbed.begin(http, urls(fleet)[0])
    assert undisturbed.done
    reader = Reader(SHAPES[name], route)
    left = undisturbed.events
    await reader.begin(http, urls(fleet)[0], rng.randrange(1, left // 2))
    for gateway in (1, 2, 0):
        await reader.come_back(http, urls(fleet)[gateway], None if gateway == 0 else rng.randrange(0, left // 4))
    assert reader.done
    assert reader.whole == undisturbed.whole
    assert len(reader.envelopes) == 1
    assert reader.events == undisturbed.events


async def test_what_has_ended_is_given_again_and_a_whole_answer_too(fleet: Fleet, http: httpx.AsyncClient) -> None:
    first, second, third = urls(fleet)
    undisturbed = Reader(body())
    await undisturbed.begin(http, first)
    undisturbed.last_id = ""
    again = Reader({}, request_id=undisturbed.request_id)
    await again.come_back(http, second)
    assert again.whole == undisturbed.whole
    at_the_end = Reader({}, request_id=again.request_id, last_id=again.last_id)
    assert await at_the_end.come_back(http, third) == 200
    assert (at_the_end.text, at_the_end.finishes, at_the_end.done) == ({}, {}, True)
    asked = {"model": "echo", "prompt": "x", "max_tokens": 400, "seed": 8, "logprobs": 1}
    answer = asyncio.create_task(http.post(f"{first}/v1/completions", json=asked, headers={"x-request-id": "mine"}))
    async with asyncio.timeout(20):
        while "sessions_running 1.0" not in (await http.get(f"{first}/metrics")).text:
            pass
    answer.cancel()
    assert isinstance((await asyncio.gather(answer, return_exceptions=True))[0], asyncio.CancelledError)
    rest = await http.get(f"{second}/v1/streams/mine")
    whole = await http.post(f"{first}/v1/completions", json=asked)
    assert rest.json()["choices"] == whole.json()["choices"]
    assert rest.json()["id"] == "cmpl-mine"


async def test_a_stream_that_still_runs_is_taken_over_and_its_old_reader_told(
    fleet: Fleet, http: httpx.AsyncClient
) -> None:
    undisturbed = Reader(body(max_tokens=300))
    await undisturbed.begin(http, urls(fleet)[0])
    first, one, other = Reader(body(max_tokens=300)), Reader({}), Reader({})
    reading = asyncio.create_task(first.begin(http, urls(fleet)[0]))
    await first.reached(5)
    one.request_id = other.request_id = first.request_id
    # Both from the beginning, at the same time: the later claim has it, whichever that is.
    await asyncio.gather(one.come_back(http, urls(fleet)[1]), other.come_back(http, urls(fleet)[2]), reading)
    assert first.error["code"] == "cancelled"
    assert sorted([one.done, other.done]) == [False, True]
    winner, loser = (one, other) if one.done else (other, one)
    assert winner.whole == undisturbed.whole
    assert loser.error["code"] in ("cancelled", "conflict")
    assert undisturbed.text[0].startswith(loser.text.get(0, ""))


async def test_nobody_else_finds_it_and_what_was_cancelled_stays_so(fleet: Fleet, http: httpx.AsyncClient) -> None:
    first, second, _ = urls(fleet)
    for request_id in ("req-" + "0" * 32, "no such", "x" * 129):
        answer = await http.get(f"{first}/v1/streams/{request_id}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    reader = Reader(body(max_tokens=8000), name="doomed")
    await reader.begin(http, first, 10)
    bad = await http.get(f"{second}/v1/streams/doomed", headers={"last-event-id": "0:1"})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "last-event-id")
    never = await http.get(f"{second}/v1/streams/doomed", headers={"last-event-id": "7:1:1"})
    assert (never.status_code, never.json()["error"]["param"]) == (400, "last-event-id")
    back = asyncio.create_task(reader.come_back(http, second))
    await reader.reached(20)
    killed = await asyncio.to_thread(fleet.cli, "kill", "doomed")
    assert killed.returncode == 0, killed.stderr
    await back
    assert reader.error["code"] == "cancelled"
    assert await Reader({}, request_id="doomed", last_id=reader.last_id).come_back(http, first) == 404


async def test_a_killed_gateways_streams_go_on_at_another(fleet: Fleet, http: httpx.AsyncClient) -> None:
    shapes = [body(max_tokens=150, seed=seed, n=1 + seed % 2) for seed in range(6)]
    undisturbed = [Reader(shape) for shape in shapes]
    await asyncio.gather(*(reader.begin(http, urls(fleet)[0]) for reader in undisturbed))
    readers = [Reader(shape) for shape in shapes]
    victim = fleet.gateways()[2]
    reading = [asyncio.create_task(reader.begin(http, url(victim))) for reader in readers]
    await asyncio.gather(*(reader.reached(12) for reader in readers))
    victim.kill()
    broken = await asyncio.gather(*reading, return_exceptions=True)
    assert all(isinstance(error, httpx.TransportError) for error in broken)
    await asyncio.gather(*(reader.come_back(http, urls(fleet)[1]) for reader in readers))
    assert [reader.whole for reader in readers] == [reader.whole for reader in undisturbed]


class Holder:
    """What a client of the gRPC API has, choice by choice."""

    def __init__(self) -> None:
        self.text, self.tokens, self.finishes = [""] * 2, [[], []], [0, 0]  # type: ignore[var-annotated]
        self.logprobs: list[list[bytes]] = [[], []]
        self.request_id = ""
        self.usage: pb.Usage | None = None

    async def read(self, call: Any, deltas: int | None = None) -> None:
        """So many deltas, or all; then it breaks off."""
        async for event in call:
            if event.HasField("start"):
                self.request_id = event.start.request_id
            elif event.HasField("usage"):
                self.usage = event.usage
            else:
                delta, choice = event.delta, event.delta.choice
                assert delta.index == len(self.tokens[choice])
                self.text[choice] += delta.text
                self.tokens[choice] += delta.token_ids
                self.finishes[choice] = delta.finish_reason or self.finishes[choice]
                self.logprobs[choice] += [one.SerializeToString(deterministic=True) for one in delta.logprobs]
                deltas = None if deltas is None else deltas - 1
            if deltas == 0:
                call.cancel()
                return

    def position(self) -> pb.ResumeStreamRequest:
        held = [
            pb.StreamPosition(
                choice=choice,
                tokens=len(self.tokens[choice]),
                text_chars=len(self.text[choice]),
                finished=bool(self.finishes[choice]),
            )
            for choice in range(2)
        ]
        return pb.ResumeStreamRequest(request_id=self.request_id, held=held)


async def test_over_grpc_a_stream_goes_on_elsewhere_from_any_position(fleet: Fleet) -> None:
    params = pb.GenerationParams(max_tokens=30, seed=9, n=2, logprobs=1, stop=["q"])
    request = pb.StreamCompleteRequest(model="echo", text="once upon a time", params=params)
    async with AsyncExitStack() as stack:
        stubs: list[Any] = []
        for gateway in fleet.gateways()[:2]:
            channel = await stack.enter_async_context(open_channel(f"127.0.0.1:{gateway.ready['grpc_port']}"))
            stubs.append(inference_pb2_grpc.InferenceStub(channel))
        undisturbed, client = Holder(), Holder()
        await undisturbed.read(stubs[0].StreamComplete(request, timeout=30))
        await client.read(stubs[0].StreamComplete(request, timeout=30), 7)
        for number, deltas in enumerate((9, 11, None)):
            await client.read(stubs[1 - number % 2].ResumeStream(client.position(), timeout=30), deltas)
        assert vars(client) == {**vars(undisturbed), "request_id": client.request_id}
        far = pb.StreamPosition(choice=1, tokens=31)
        twice = [pb.StreamPosition(choice=0)] * 2
        for bad, code, param in (
            (pb.ResumeStreamRequest(request_id=client.request_id, held=[far]), "invalid_request", "held"),
            (pb.ResumeStreamRequest(request_id=client.request_id, held=twice), "invalid_request", "held"),
            (pb.ResumeStreamRequest(), "invalid_request", "request_id"),
            (pb.ResumeStreamRequest(request_id="req-none"), "not_found", ""),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stubs[0].ResumeStream(bad, timeout=30).read()
            error = error_from_rpc(refused.value)
            assert (error.code, error.param or "") == (code, param)


def ask(fleet: Fleet, gateways: list[Process]) -> subprocess.Popen[bytes]:
    """The real command, with several gateways to choose from."""
    addresses = ",".join(f"127.0.0.1:{gateway.ready['grpc_port']}" for gateway in gateways)
    command = [
        sys.executable,
        "-m",
        "llmos.cli.main",
        "generate",
        "--raw",
        "a tale",
        "--seed",
        "3",
        "--max-tokens",
        "400",
    ]
    environment = {**fleet.environment, "LLMOS_ADDRESS": addresses}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


async def taken_up(gateway: Process) -> float:
    """Streams that this gateway went on with."""
    async with httpx.AsyncClient(verify=False) as http:
        text = (await http.get(f"{url(gateway)}/metrics")).text
    (value,) = re.findall(r"^\S*sessions_taken_up_total (\S+)$", text, re.MULTILINE)
    return float(value)


async def test_the_command_goes_on_by_id_when_its_gateway_is_killed(fleet: Fleet) -> None:
    """The last test of this file: it takes another gateway's life."""
    first, second, _ = fleet.gateways()
    before = await taken_up(first)
    with ask(fleet, [first]) as undisturbed, ask(fleet, [second, first]) as disturbed:
        assert disturbed.stdout is not None
        beginning = await asyncio.to_thread(os.read, disturbed.stdout.fileno(), 4)
        second.kill()
        whole, complaints = await asyncio.to_thread(undisturbed.communicate, timeout=30)
        rest, said = await asyncio.to_thread(disturbed.communicate, timeout=30)
    assert (undisturbed.returncode, disturbed.returncode, complaints, said) == (0, 0, b"", b"")
    assert beginning + rest == whole
    assert len(beginning) < len(whole)
    assert await taken_up(first) == before + 1
