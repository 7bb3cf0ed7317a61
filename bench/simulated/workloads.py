"""Four kinds of traffic: shared system prompts, multi-turn chat, long documents, bursty mixed tenants.

Lengths are log-normal within bounds; arrivals are Poisson unless said otherwise. A workload is a function of its seed,
rate and duration: whoever serves it gets the same requests.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from bench.simulated.job import BLOCK_TOKENS
from bench.simulated.traffic import Bounds, Fate, Request

_MASK = (1 << 64) - 1


def blocks(stream: int, first: int, end: int) -> list[int]:
    """Hashes of the blocks `first` to `end` - 1 of a text, which is named by a number."""
    start = stream * 0x9E3779B97F4A7C15
    return [(start ^ (number + 1) * 0xBF58476D1CE4E5B9) & _MASK for number in range(first, end)]


def length(rng: random.Random, median: float, low: int, high: int, sigma: float = 0.6) -> int:
    """Log-normal, cut at the bounds."""
    return int(min(high, max(low, rng.lognormvariate(math.log(median), sigma))))


def poisson(rng: random.Random, rate: float, duration: float, begin: float = 0.0) -> Iterable[float]:
    """Times of arrivals from `begin` on, for `duration` seconds."""
    now = begin + rng.expovariate(rate)
    while now < begin + duration:
        yield now
        now += rng.expovariate(rate)


def zipf(rng: random.Random, count: int, exponent: float = 1.0) -> int:
    """A number below `count`; the first ones are the popular ones."""
    return rng.choices(range(count), [1 / (rank + 1) ** exponent for rank in range(count)])[0]


def prompt_hashes(shared: int, shared_tokens: int, own: int, tokens: int) -> list[int]:
    """Of a prompt of `tokens` that begins with `shared_tokens` of another text."""
    common = shared_tokens // BLOCK_TOKENS
    return blocks(shared, 0, common) + blocks(own, common, tokens // BLOCK_TOKENS)


@dataclass(slots=True)
class Listed:
    """Requests with times; nothing follows on them."""

    requests: list[tuple[float, Request]]

    def arrivals(self) -> Iterable[tuple[float, Request]]:
        """See `Workload`."""
        return self.requests

    def after(self, fate: Fate, now: float) -> tuple[float, Request] | None:
        """See `Workload`."""
        return None


APPS = 40
ANSWER_LIMIT = 256


def shared_prompts(seed: int, rate: float, duration: float) -> Listed:
    """Applications of rising rarity, each with a system prompt of its own and many short questions."""
    rng = random.Random(f"shared prompts/{seed}")
    system = [length(rng, 640, 256, 1024, 0.4) for _ in range(APPS)]
    bounds = Bounds(4.0, 0.5)
    found = []
    for number, now in enumerate(poisson(rng, rate, duration)):
        app = zipf(rng, APPS)
        prompt = system[app] + length(rng, 60, 16, 300)
        hashes = prompt_hashes(app, system[app], 1000 + number, prompt)
        answer = length(rng, 48, 8, ANSWER_LIMIT)
        found.append((now, Request(f"s{number}", f"app{app}", prompt, hashes, answer, ANSWER_LIMIT, bounds)))
    return Listed(found)


@dataclass(slots=True)
class Chat:
    """Conversations: a turn repeats all that was said before; the next one comes a while after the answer."""

    seed: int
    rate: float
    """Conversations per second."""
    duration: float
    _turns: dict[str, tuple[float, Request]] = field(default_factory=dict)
    """What follows on a request, and how long the user thinks before."""

    def arrivals(self) -> Iterable[tuple[float, Request]]:
        """See `Workload`."""
        rng = random.Random(f"chat/{self.seed}")
        for number, now in enumerate(poisson(rng, self.rate, self.duration)):
            yield now, self._converse(rng, number)

    def after(self, fate: Fate, now: float) -> tuple[float, Request] | None:
        """See `Workload`. Who was rejected does not come back."""
        following = self._turns.get(fate.request.id)
        if following is None or fate.ended == math.inf:
            return None
        when = now + following[0]
        return (when, following[1]) if when < self.duration else None

    def _converse(self, rng: random.Random, number: int) -> Request:
        app, tokens, turns = zipf(rng, 4), 320, min(12, 1 + int(rng.expovariate(1 / 5)))
        requests = []
        for turn in range(turns):
            prompt = tokens + length(rng, 50, 8, 600, 0.9)
            answer = length(rng, 60, 8, ANSWER_LIMIT)
            hashes = prompt_hashes(app, 320, 1000 + number, prompt)
            bounds = Bounds(3.0, 0.5)
            requests.append(Request(f"c{number}.{turn}", f"u{number}", prompt, hashes, answer, ANSWER_LIMIT, bounds))
            tokens = prompt + answer
        for before, after in itertools.pairwise(requests):
            self._turns[before.id] = (2.0 + rng.expovariate(1 / 8), after)
        return requests[0]


def documents(seed: int, rate: float, duration: float) -> Listed:
    """Long documents, each asked about a few times within a minute; answers are short."""
    rng = random.Random(f"documents/{seed}")
    bounds, found = Bounds(12.0, 1.0), []
    for number, begun in enumerate(poisson(rng, rate / 3, duration + 30, -30.0)):
        document = length(rng, 1200, 768, 2048, 0.35)
        now = begun
        for question in range(min(8, 1 + int(rng.expovariate(1 / 2.2)))):
            prompt = document + length(rng, 40, 16, 120)
            hashes = prompt_hashes(1000 + number, document, 10**6 + 10 * number + question, prompt)
            request = Request(
                f"d{number}.{question}", f"t{number % 8}", prompt, hashes, length(rng, 16, 4, 64), 64, bounds
            )
            if 0 <= now < duration:
                found.append((now, request))
            now += 1.0 + rng.expovariate(1 / 8)
    return Listed(sorted(found, key=lambda one: one[0]))


BURST_S = 2.0
BURSTY_SHARE = 0.4
"""Of all requests, those that come in bursts."""


def bursty(seed: int, rate: float, duration: float) -> Listed:
    """Six steady tenants, whose users wait, and two that send bursts and are content with later answers."""
    rng = random.Random(f"bursty/{seed}")
    steady = shared_prompts(seed, rate * (1 - BURSTY_SHARE), duration).requests
    found = [(now, replace(one, tenant=f"steady{int(one.tenant[3:]) % 6}")) for now, one in steady]
    size = max(8.0, rate * 3)
    for tenant in range(2):
        count = 0
        for begun in poisson(rng, rate * BURSTY_SHARE / 2 / size, duration):
            for now in poisson(rng, size / BURST_S, BURST_S, begun):
                count += 1
                found.append((now, _burst(rng, tenant, count)))
    return Listed(sorted(((now, one) for now, one in found if now < duration), key=lambda one: one[0]))


def _burst(rng: random.Random, tenant: int, number: int) -> Request:
    prompt = 384 + length(rng, 200, 64, 700)
    hashes = prompt_hashes(100 + tenant, 384, 10**6 * (tenant + 1) + number, prompt)
    answer = length(rng, 48, 8, ANSWER_LIMIT)
    bounds = Bounds(15.0, 1.0)
    return Request(f"b{tenant}.{number}", f"bursty{tenant}", prompt, hashes, answer, ANSWER_LIMIT, bounds, False)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
