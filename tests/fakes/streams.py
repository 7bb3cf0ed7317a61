"""Many streams through real gateways whose every character is known beforehand; what was lost, repeated or changed."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import httpx

from worker.backends.echo import echo_token, prompt_digest


def expected_text(prompt: str, seed: int, tokens: int) -> str:
    """What the echo model answers: the undisturbed run, computed here."""
    digest = prompt_digest(list(prompt.encode()))
    return "".join(chr(echo_token(digest, seed, 0, index)) for index in range(tokens))


@dataclass(slots=True)
class Streamed:
    """One stream."""

    prompt: str
    tokens: int
    seed: int = 7
    text: str = ""
    finish: str = ""
    error: str = ""
    times_s: list[float] = field(default_factory=list)
    """When each event with text came."""

    @property
    def verdict(self) -> str:
        """`whole`, or what went wrong: `lost`, `changed` or `repeated`."""
        full = expected_text(self.prompt, self.seed, self.tokens)
        if self.text == full and self.finish == "length":
            return "whole"
        if len(self.text) > len(full):
            return "repeated"
        return "lost" if full.startswith(self.text) else "changed"


async def follow(client: httpx.AsyncClient, url: str, stream: Streamed) -> None:
    """Ask for a completion and read it to its end."""
    body = {
        "model": "echo",
        "prompt": stream.prompt,
        "max_tokens": stream.tokens,
        "seed": stream.seed,
        "stream": True,
    }
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                stream.error = str(event["error"])
                return
            for choice in event["choices"]:
                stream.text += choice["text"]
                stream.finish = choice["finish_reason"] or stream.finish
                stream.times_s.append(time.monotonic())


async def first_answer_s(urls: Sequence[str], patience_s: float = 30.0) -> float:
    """Seconds until a request that is asked for now, again and again, is answered."""
    begun = time.monotonic()
    async with httpx.AsyncClient(timeout=patience_s) as client:
        while True:
            body = {"model": "echo", "prompt": "new", "max_tokens": 1}
            try:
                answer = await client.post(f"{urls[0]}/v1/completions", json=body)
            except httpx.HTTPError:
                answer = None
            took = time.monotonic() - begun
            if answer is not None and answer.status_code == 200:
                return took
            if took > patience_s:
                raise TimeoutError(f"no answer within {patience_s} s")
            await asyncio.sleep(0.02)


async def disturbed(
    urls: Sequence[str],
    streams: Sequence[Streamed],
    disturb: Callable[[Callable[[int], Awaitable[None]]], Awaitable[None]],
) -> Counter[str]:
    """Follow all streams while `disturb(reached)` does its work; `reached(n)` waits until each has n characters."""
    limits = httpx.Limits(max_connections=len(streams))

    async def reached(count: int) -> None:
        async with asyncio.timeout(120):
            while any(len(stream.text) < count and not stream.error for stream in streams):  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async with httpx.AsyncClient(timeout=240, limits=limits) as client, asyncio.TaskGroup() as group:
        for number, stream in enumerate(streams):
            group.create_task(follow(client, urls[number % len(urls)], stream))
        group.create_task(disturb(reached))  # type: ignore[arg-type]
    return Counter(stream.verdict for stream in streams)
