"""`python -m gateway` as a process in front of a scripted scheduler: its start, its drain, its exit status."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fakes.scheduler import LENGTH, FakeScheduler, output

ROOT = Path(__file__).parents[3]
WAIT_S = 30.0
BODY = {"model": "echo", "prompt": "x", "max_tokens": 4, "stream": True}


@dataclass
class Gateway:
    """A running process and what it said in its ready file."""

    process: asyncio.subprocess.Process
    ready: dict[str, Any]
    scheduler: FakeScheduler

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ready['http_port']}"

    async def exit_status(self) -> int:
        return await asyncio.wait_for(self.process.wait(), WAIT_S)


Start = Callable[..., Awaitable[Gateway]]


async def launch(*flags: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "--http-port", "0", "--grpc-port", "0", *flags, cwd=ROOT, stderr=pipe
    )


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    scheduler = FakeScheduler(answer=lambda self, request: self.send(output(request.request_id, 0, "ab")))
    address = await scheduler.start()
    started: list[asyncio.subprocess.Process] = []

    async def start(*flags: str) -> Gateway:
        ready_file = tmp_path / "ready.json"
        process = await launch("--schedulers", address, "--ready-file", str(ready_file), *flags)
        started.append(process)
        async with asyncio.timeout(WAIT_S):
            while not ready_file.exists():
                assert process.returncode is None
                await asyncio.sleep(0.02)
        await scheduler.until(lambda: scheduler.attached)
        return Gateway(process, json.loads(ready_file.read_text()), scheduler)

    yield start
    for process in started:
        with suppress(ProcessLookupError):  # it has ended, as it should
            process.kill()
        await process.communicate()
    await scheduler.stop()


async def is_ready(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(WAIT_S):
        while (await http.get("/ready")).status_code != 200:  # noqa: ASYNC110 - a probe is polled
            await asyncio.sleep(0.02)


async def test_the_ready_file_names_the_ports_and_the_process(start: Start) -> None:
    gateway = await start("--id", "g7")
    assert gateway.ready["id"] == "g7"
    assert gateway.ready["pid"] == gateway.process.pid
    assert gateway.ready["port"] == gateway.ready["http_port"]
    hello = gateway.scheduler.hellos[-1]
    assert hello.node.id == "g7"
    assert hello.node.address == f"127.0.0.1:{gateway.ready['grpc_port']}"
    gateway.process.send_signal(signal.SIGTERM)
    assert await gateway.exit_status() == 0


async def test_running_streams_end_before_the_process_does(start: Start) -> None:
    gateway = await start()
    async with httpx.AsyncClient(base_url=gateway.url, timeout=WAIT_S) as http:
        await is_ready(http)
        async with http.stream("POST", "/v1/completions", json=BODY) as response:
            request = await gateway.scheduler.next_submit()
            lines = response.aiter_lines()
            while '"text":"b"' not in await anext(lines):  # one event per token
                pass
            gateway.process.send_signal(signal.SIGTERM)
            await refused(gateway.url)
            gateway.scheduler.send(output(request.request_id, 2, "cd", finish=LENGTH))
            rest = [line async for line in lines]
    assert [text for text in "cd" if any(f'"text":"{text}"' in line for line in rest)] == ["c", "d"]
    assert "data: [DONE]" in rest
    assert await gateway.exit_status() == 0


async def test_streams_that_outlast_the_drain_end_with_an_error_event(start: Start) -> None:
    gateway = await start("--drain-s", "0.3")
    async with httpx.AsyncClient(base_url=gateway.url, timeout=WAIT_S) as http:
        await is_ready(http)
        async with http.stream("POST", "/v1/completions", json=BODY) as response:
            gateway.process.send_signal(signal.SIGTERM)
            lines = [line async for line in response.aiter_lines() if line.startswith("data: ")]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "unavailable"
    assert await gateway.exit_status() == 0


async def refused(url: str) -> None:
    """Wait until the gateway takes no new connection."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                async with httpx.AsyncClient(base_url=url) as http:
                    await http.get("/health")
            except httpx.ConnectError:
                return
            except httpx.TransportError:
                pass  # taken from the backlog of the listener that closes: not an answer, nor a refusal yet
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--host", "0.0.0.0"), b"llmos keys add"),
        (("--keys-file", "/nowhere/keys.json"), b"cannot read the keys file"),
        (("--http-port", "many"), b"http_port"),
        (("--no-such-flag", "1"), b"unrecognized"),
    ],
)
async def test_what_cannot_work_is_said_in_one_line(flags: tuple[str, ...], said: bytes) -> None:
    process = await launch(*flags)
    _, errors = await asyncio.wait_for(process.communicate(), WAIT_S)
    assert process.returncode == 2
    assert said in errors
    assert len(errors.strip().splitlines()) == 1
