"""A client of the HTTP API that loses its stream at a place of its choice and comes back to it, anywhere."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import httpx

_WAIT_S = 20.0


@dataclass
class Reader:
    """One client. Notes what it has, choice by choice, as any client of such an API would."""

    body: dict[str, Any]
    route: str = "/v1/completions"
    key: str = "any"
    name: str = ""
    """Its own id for the request; empty: none."""
    request_id: str = ""
    last_id: str = ""
    text: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[Any]] = field(default_factory=dict)
    finishes: dict[int, list[str]] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    envelopes: set[tuple[Any, ...]] = field(default_factory=set)
    error: dict[str, Any] = field(default_factory=dict)
    done: bool = False
    events: int = 0
    _more: asyncio.Event = field(default_factory=asyncio.Event)

    async def reached(self, events: int) -> None:
        """Wait until it has got so many events in all."""
        async with asyncio.timeout(_WAIT_S):
            while self.events < events:
                self._more.clear()
                await self._more.wait()

    async def begin(self, http: httpx.AsyncClient, url: str, events: int | None = None) -> None:
        """Ask, and read `events` events or all; then break the connection."""
        headers = {"authorization": f"Bearer {self.key}", **({"x-request-id": self.name} if self.name else {})}
        async with http.stream("POST", url + self.route, json={**self.body, "stream": True}, headers=headers) as answer:
            await self._read(answer, events)

    async def come_back(self, http: httpx.AsyncClient, url: str, events: int | None = None) -> int:
        """Ask for the rest, and read `events` events of it or all. Returns the status."""
        headers = {"authorization": f"Bearer {self.key}", **({"last-event-id": self.last_id} if self.last_id else {})}
        async with http.stream("GET", f"{url}/v1/streams/{self.request_id or self.name}", headers=headers) as answer:
            await self._read(answer, events)
            return answer.status_code

    async def _read(self, answer: httpx.Response, events: int | None) -> None:
        if answer.status_code != 200:
            self.error = json.loads(await answer.aread())["error"]
            return
        self.request_id = answer.headers["x-request-id"]
        seen, event_id = 0, ""
        if seen == events:
            return
        async for line in answer.aiter_lines():
            if line.startswith("id: "):
                event_id = line.removeprefix("id: ")
            elif line == "data: [DONE]":
                self.done = True
            elif line.startswith("data: "):
                self._take(json.loads(line.removeprefix("data: ")))
                self.last_id = event_id or self.last_id
                seen += 1
                self.events += 1
                self._more.set()
                if seen == events:
                    return

    def _take(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            self.error = chunk["error"]
            return
        self.envelopes.add((chunk["id"], chunk["created"], chunk["model"], chunk["object"]))
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk["choices"]:
            number = choice["index"]
            said = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            self.text[number] = self.text.get(number, "") + said
            if choice["logprobs"]:
                self.logprobs.setdefault(number, []).append(choice["logprobs"])
            if choice["finish_reason"]:
                self.finishes.setdefault(number, []).append(choice["finish_reason"])

    @property
    def whole(self) -> tuple[Any, ...]:
        """Everything that must be the same, however often the stream broke."""
        return self.text, self.logprobs, self.finishes, self.usage
