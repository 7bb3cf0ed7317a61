"""The served mix: requests of many sizes, and when they arrive. Pure; everything follows from a seed."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

PROMPT_TOKENS = (32, 1024)
OUTPUT_TOKENS = (16, 256)
"""Bounds; sizes between them are log-uniform, so that most requests are short and most work is in long ones."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request of the mix."""

    first: int
    """Place of its prompt in a text of tokens."""
    prompt_tokens: int
    output_tokens: int
    seed: int
    """For its sampling."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """When a request comes, in seconds from the start."""

    at_s: float
    request: Request


def requests(text_tokens: int, seed: int) -> Iterator[Request]:
    """Without end. Prompts lie anywhere in a text of `text_tokens` tokens; no two begin at the same place."""
    source = random.Random(f"requests {seed}")
    places = list(range(text_tokens - PROMPT_TOKENS[1]))
    source.shuffle(places)
    for number, first in enumerate(itertools.cycle(places)):
        yield Request(first, _size(source, PROMPT_TOKENS), _size(source, OUTPUT_TOKENS), seed * 1_000_000 + number)


def arrivals(rate: float, seconds: float, text_tokens: int, seed: int) -> list[Arrival]:
    """A Poisson process of `rate` requests per second, for so long; one request at once if none would come."""
    source, stream = random.Random(f"arrivals {seed}"), requests(text_tokens, seed)
    found: list[Arrival] = []
    now = source.expovariate(rate)
    while now < seconds:
        found.append(Arrival(now, next(stream)))
        now += source.expovariate(rate)
    return found or [Arrival(0.0, next(stream))]


def mean_output_tokens() -> float:
    """Of the mix."""
    low, high = OUTPUT_TOKENS
    return (high - low) / math.log(high / low)


def _size(source: random.Random, bounds: tuple[int, int]) -> int:
    low, high = bounds
    return round(math.exp(source.uniform(math.log(low), math.log(high))))
