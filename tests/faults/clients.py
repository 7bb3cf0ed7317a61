"""Clients of a scenario: long streams whose every character is known, and short requests without pause."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import httpx

from tests.faults.scenario import Load
from tests.faults.verdict import Counts, compare
from worker.backends.echo import echo_token, prompt_digest

KINDS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.9, "top_p": 0.95},
    "four": {"n": 4, "temperature": 0.8},
    "penalties": {"temperature": 0.7, "frequency_penalty": 0.6, "presence_penalty": 0.4},
    "json": {"temperature": 0.9, "guided_json": {"type": "array", "items": {"type": "integer"}, "minItems": 40}},
}
"""Kinds of requests by name."""
_BREATH_S = 0.05
_RETURNS = 40
"""Tries to come back after a break; with the pause between them about ten seconds."""
_RETURN_PAUSE_S = 0.25
_LONGEST_ABSENCE_S = 4.0


def expected_text(prompt: str, seed: int, tokens: int, choice: int = 0) -> str:
    """What the echo model answers: the undisturbed run, computed here."""
    digest = prompt_digest(list(prompt.encode()))
    return "".join(chr(echo_token(digest, seed, choice, index)) for index in range(tokens))


@dataclass(slots=True)
class Streamed:
    """One stream and all that a client can say of it."""

    body: dict[str, object]
    """What is asked for."""
    gateway: int
    expected: dict[int, str]
    """By choice; of a real model, what the undisturbed run gave."""
    texts: dict[int, str] = field(default_factory=dict)
    finishes: dict[int, str] = field(default_factory=dict)
    times_s: list[float] = field(default_factory=list)
    """Monotonic, of each event with text."""
    status: int = 0
    error: str = ""
    """Code of the typed error that ended it."""
    broken: str = ""
    """How its connection broke, if nobody mended that."""
    returns: int = 0
    """So often it came back after a break."""
    ends: int = 0
    """Typed ends that were seen: [DONE], or an error."""
    last_event_id: str = ""
    request_id: str = ""
    leave_at: int = 0
    """It resets its connection once it has so many tokens; 0: it stays."""
    left_at: float = 0.0
    """When it did, monotonic."""
    returning: bool = False
    """Once it has left it comes back, and asks for all behind some event that it had."""
    over: bool = False
    """It has ended somehow, and nobody comes back to it."""
    offsets: list[tuple[str, dict[int, int]]] = field(default_factory=list)
    """Of one that returns: id of each event, and characters by choice up to it."""
    _id: str = ""
    _data: str = ""

    @property
    def reached(self) -> int:
        """Events with text so far, per choice."""
        return len(self.times_s) // max(1, len(self.expected))

    def counts(self) -> Counts:
        """What was lost, duplicated, corrupted."""
        found = Counts()
        if self.status != 200:
            return found  # refused, not accepted
        for choice, expected in self.expected.items():
            got = self.texts.get(choice, "")
            found.add(compare(expected, got))
            if (
                not self.left_at
                and not self.error
                and not self.broken
                and (len(got) < len(expected) or not self.finishes.get(choice))
            ):
                found.lost = 1
        if self.ends != 1 and not self.left_at:
            found.lost = 1
        return found

    def longest_pause_s(self, since: float) -> float:
        """Between two events, of which the later one came after `since`."""
        return max((later - earlier for earlier, later in pairwise(self.times_s) if later >= since), default=0.0)

    def take(self, line: str) -> None:
        """One line of server-sent events. An event counts once the empty line behind it is there."""
        if line.startswith("id:"):
            self._id = line[3:].strip()
        elif line.startswith("data:"):
            self._data = line[5:].strip()
        elif not line and self._data:
            self._event(self._data)
            self.last_event_id = self._id or self.last_event_id
            if self.returning and self._id:
                self.offsets.append((self._id, {choice: len(text) for choice, text in self.texts.items()}))
            self._id = self._data = ""

    def go_back(self, rng: random.Random) -> None:
        """Forget all behind some event; the absence is no gap."""
        self.last_event_id, known = rng.choice(self.offsets) if self.offsets else ("", {})
        self.texts = {choice: text[: known.get(choice, 0)] for choice, text in self.texts.items()}
        self.finishes = {}
        self.times_s, self.offsets = [], []
        self.returning, self.leave_at, self.left_at = False, 0, 0.0
        self.broken = "left"

    def _event(self, data: str) -> None:
        if data == "[DONE]":
            self.ends += 1
            return
        event = json.loads(data)
        if "error" in event:
            self.error = str(event["error"].get("code") or "error")
            self.ends += 1
            return
        for choice in event.get("choices", []):
            self.texts[choice["index"]] = self.texts.get(choice["index"], "") + choice["text"]
            if choice["finish_reason"]:
                self.finishes[choice["index"]] = choice["finish_reason"]
            if choice["text"]:
                self.times_s.append(time.monotonic())


@dataclass(slots=True)
class Asked:
    """Tally of the short requests."""

    answers: int = 0
    counts: Counts = field(default_factory=Counts)
    errors: dict[str, int] = field(default_factory=dict)
    answered_at: list[tuple[float, float]] = field(default_factory=list)
    """When each was begun and answered, monotonic."""

    def failed(self, code: str) -> None:
        """Count an error."""
        self.errors[code] = self.errors.get(code, 0) + 1

    def first_after(self, since: float) -> float:
        """Seconds after `since` until a request begun since was answered; -1: none was."""
        return min((end - since for begun, end in self.answered_at if begun >= since), default=-1.0)


class Clients:
    """All clients of one scenario. `urls` are the gateways' base addresses."""

    def __init__(self, urls: Sequence[str], load: Load, seed: int, client: httpx.AsyncClient) -> None:
        rng = random.Random(seed)
        self.load = load
        self._urls = list(urls)
        self._http = client
        self.streams = [self._stream(number, seed, rng) for number in range(load.streams)]
        for number, stream in enumerate(self.streams[: load.leavers + load.returners]):
            stream.leave_at = rng.randrange(1, load.tokens * 2 // 3)
            stream.returning = number >= load.leavers
        self._rng = random.Random(seed)
        self.asked = Asked()
        self.enough = asyncio.Event()
        """Set once the events are over: askers end."""
        self.leave = asyncio.Event()
        """Every stream resets its connection."""

    def _stream(self, number: int, seed: int, rng: random.Random) -> Streamed:
        load = self.load
        kind = KINDS[load.kinds[number % len(load.kinds)]]
        prompt, own_seed = f"{load.prompt} {number} of {seed}", rng.getrandbits(31)
        body = {
            "model": load.model,
            "prompt": prompt,
            "max_tokens": load.tokens,
            "seed": own_seed,
            "stream": True,
            **kind,
        }
        if load.unknown and "guided_json" not in kind:
            body["ignore_eos"] = True  # a real model may want to stop before the fault
        choices = range(int(str(body.get("n", 1))))
        expected = {choice: expected_text(prompt, own_seed, load.tokens, choice) for choice in choices}
        return Streamed(body, number % len(self._urls), expected)

    def expect(self, undisturbed: Sequence[dict[int, str]]) -> None:
        """From now on what another run gave, by stream and choice, is what must come."""
        for stream, texts in zip(self.streams, undisturbed, strict=True):
            stream.expected = dict(texts)

    @property
    def reached(self) -> int:
        """Tokens of the slowest stream that goes on."""
        going = [stream.reached for stream in self.streams if not stream.over]
        return min(going) if going else 1 << 30

    async def follow(self, stream: Streamed) -> None:
        """Read one stream to its end, coming back after breaks if the load says so."""
        try:
            async with asyncio.timeout(self.load.patience_s):
                await self._once(stream, "POST", "/v1/completions", stream.body)
                if stream.left_at and stream.returning:
                    await asyncio.sleep(self._rng.uniform(0.0, _LONGEST_ABSENCE_S))
                    stream.go_back(self._rng)
                while stream.broken and self.load.returns and stream.returns < _RETURNS:
                    await self._come_back(stream)
        except TimeoutError:
            stream.broken = stream.broken or "no end in time"
        finally:
            stream.over = True

    async def _come_back(self, stream: Streamed) -> None:
        stream.returns += 1
        stream.gateway = (stream.gateway + 1) % len(self._urls)
        stream.broken = ""
        if not stream.request_id:
            await self._once(stream, "POST", "/v1/completions", stream.body)  # nothing was accepted yet
        else:
            await self._once(stream, "GET", f"/v1/streams/{stream.request_id}", None)
        if stream.broken:
            await asyncio.sleep(_RETURN_PAUSE_S)

    async def _once(self, stream: Streamed, method: str, path: str, body: dict[str, object] | None) -> None:
        headers = {"last-event-id": stream.last_event_id} if method == "GET" else {}
        url = self._urls[stream.gateway] + path
        try:
            async with self._http.stream(method, url, json=body, headers=headers) as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    self._refused(stream, answer, method)
                    return
                stream.status = 200
                stream.request_id = stream.request_id or answer.headers.get("x-request-id", "")
                async for line in answer.aiter_lines():
                    stream.take(line)
                    if self.leave.is_set() or 0 < stream.leave_at <= stream.reached:
                        _linger_not(answer)
                        stream.left_at = time.monotonic()
                        return
            if not stream.ends:
                stream.broken = "closed without an end"
        except (httpx.HTTPError, OSError) as error:
            stream.broken = type(error).__name__

    def _refused(self, stream: Streamed, answer: httpx.Response, method: str) -> None:
        code = _code(answer)
        if method == "GET":
            stream.broken = f"return refused: {answer.status_code} {code}"
        else:
            stream.status, stream.error = answer.status_code, code

    async def say(self, prompt: str) -> str:
        """One request, answered whole. Returns `answered`, or the code of its error."""
        body = {"model": self.load.model, "prompt": prompt, "max_tokens": 4, "seed": 7}
        answer = await self._http.post(f"{self._urls[0]}/v1/completions", json=body, timeout=self.load.patience_s)
        return "answered" if answer.status_code == 200 else _code(answer)

    async def hurried(self, number: int, tokens: int, http: httpx.AsyncClient) -> str:
        """One request of a crowd. Returns `answered`, `wrong`, its error, or `no retry-after`."""
        prompt, url = f"hurry {number}", self._urls[number % len(self._urls)]
        body = {"model": self.load.model, "prompt": prompt, "max_tokens": tokens, "seed": number}
        try:
            answer = await http.post(f"{url}/v1/completions", json=body, timeout=self.load.patience_s)
        except (httpx.HTTPError, OSError) as error:
            return type(error).__name__
        if answer.status_code == 200:
            right = answer.json()["choices"][0]["text"] == expected_text(prompt, number, tokens)
            return "answered" if right else "wrong"
        return _code(answer) if "retry-after" in answer.headers else "no retry-after"

    async def ask(self, number: int) -> None:
        """Short requests, one after the other, until it is enough."""
        prompt = f"ask {number}"
        expected = "" if self.load.unknown else expected_text(prompt, 7, 4)
        body = {"model": self.load.model, "prompt": prompt, "max_tokens": 4, "seed": 7}
        url = self._urls[number % len(self._urls)]
        while not self.enough.is_set():
            begun = time.monotonic()
            try:
                answer = await self._http.post(f"{url}/v1/completions", json=body, timeout=self.load.patience_s)
            except (httpx.HTTPError, OSError) as error:
                self.asked.failed(type(error).__name__)
                url = self._urls[(self._urls.index(url) + 1) % len(self._urls)]
                await asyncio.sleep(_BREATH_S)
                continue
            if answer.status_code != 200:
                self.asked.failed(_code(answer))
            else:
                self.asked.answers += 1
                text = answer.json()["choices"][0]["text"]
                expected = expected or text
                self.asked.counts.add(compare(expected, text))
                self.asked.counts.lost += len(text) < len(expected)
                self.asked.answered_at.append((begun, time.monotonic()))
            await asyncio.sleep(_BREATH_S)


def _linger_not(answer: httpx.Response) -> None:
    """Closing the connection will be a reset."""
    sock = answer.extensions["network_stream"].get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _code(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return str(answer.status_code)
