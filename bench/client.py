"""A load generator for OpenAI-compatible servers: streams completions and notes when their tokens come.

Only asyncio and plain sockets, since it shares the machine with the server that it measures.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.mix import Arrival

PATH = "/v1/completions"
_LINE_BYTES = 1 << 20


@dataclass(slots=True)
class Trace:
    """What became of one request. Times are seconds of one clock."""

    due_s: float
    """When it was to be sent; what waits in the client counts as waiting."""
    output_tokens: int
    """Asked for."""
    times_s: list[float] = field(default_factory=list)
    """When each event with text came."""
    finished: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """Where to send to, and what all its requests have in common."""

    port: int
    fields: Mapping[str, Any]
    key: str = "bench"
    """API key."""
    timeout_s: float = 0.0
    """Deadline that the server is told; 0: none."""


async def play(target: Target, arrivals: Sequence[Arrival], prompts: Sequence[str], patience_s: float) -> list[Trace]:
    """Send each request when it is due; wait for the last at most `patience_s` after the last arrival."""
    start = time.perf_counter()
    traces = [Trace(start + arrival.at_s, arrival.request.output_tokens) for arrival in arrivals]

    async def one(trace: Trace, arrival: Arrival, prompt: str) -> None:
        await asyncio.sleep(trace.due_s - time.perf_counter())
        await send(target, prompt, arrival.request.seed, trace)

    jobs = [asyncio.create_task(one(*job)) for job in zip(traces, arrivals, prompts, strict=True)]
    await asyncio.wait(jobs, timeout=arrivals[-1].at_s + patience_s)
    await _cancel(jobs)
    return traces


async def saturate(target: Target, work: Iterable[tuple[str, int, int]], clients: int, seconds: float) -> list[Trace]:
    """`clients` clients for so long, each sending its next request as soon as its last one ends.

    `work` yields prompt, output tokens and seed. What still runs at the end is cut off.
    """
    queue, traces = iter(work), []

    async def client() -> None:
        for prompt, output_tokens, seed in queue:
            traces.append(trace := Trace(time.perf_counter(), output_tokens))
            await send(target, prompt, seed, trace)
            if trace.error:
                return

    jobs = [asyncio.create_task(client()) for _ in range(clients)]
    await asyncio.wait(jobs, timeout=seconds)
    await _cancel(jobs)
    return traces


async def send(target: Target, prompt: str, seed: int, trace: Trace) -> None:
    """Stream one completion into its trace. What the server or the connection says against it becomes its error."""
    body = {**target.fields, "prompt": prompt, "max_tokens": trace.output_tokens, "seed": seed, "stream": True}
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", target.port, limit=_LINE_BYTES)
        try:
            payload = json.dumps(body).encode()
            writer.write(_head(target, len(payload)) + payload)
            await _read(reader, trace)
        finally:
            writer.close()
    except (OSError, ValueError, asyncio.IncompleteReadError) as error:
        trace.error = f"{type(error).__name__}: {error}"


async def _read(reader: asyncio.StreamReader, trace: Trace) -> None:
    status = await reader.readline()
    if b" 200 " not in status:
        trace.error = (status + await reader.read(2000)).decode(errors="replace")
        return
    while line := await reader.readline():
        # Lines of the chunked encoding and the headers lie between the events; no server splits an event.
        if not line.startswith(b"data:"):
            continue
        now = time.perf_counter()
        if line.strip() == b"data: [DONE]":
            trace.finished = True
            return
        event = json.loads(line[5:])
        if "error" in event:
            trace.error = str(event["error"])
            return
        if any(choice.get("text") for choice in event.get("choices", ())):
            trace.times_s.append(now)
    trace.error = "the stream broke off"


def _head(target: Target, length: int) -> bytes:
    lines = [
        f"POST {PATH} HTTP/1.1",
        "Host: 127.0.0.1",
        f"Authorization: Bearer {target.key}",
        "Content-Type: application/json",
        f"Content-Length: {length}",
        "Connection: close",
    ]
    if target.timeout_s:
        lines.append(f"x-request-timeout: {target.timeout_s:g}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def _cancel(jobs: Sequence[asyncio.Task[None]]) -> None:
    for job in jobs:
        job.cancel()
    await asyncio.gather(*jobs, return_exceptions=True)


def gaps(trace: Trace) -> Iterator[float]:
    """Seconds between its events."""
    return (after - before for before, after in zip(trace.times_s, trace.times_s[1:], strict=False))
