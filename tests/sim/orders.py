"""What clients ask for, how they behave, and what each must get: values, drawn from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import Literal

from worker.backends.echo import echo_token, prompt_digest

Habit = Literal["read", "cancel", "leave", "kill", "dawdle", "deadline"]
_LONG = 450
_SMALL = 128
"""Tokens up to which three choices fit the smallest worker."""


@dataclass(frozen=True, slots=True)
class Break:
    """A client's own connection is lost."""

    after: int
    """Tokens, all choices together."""
    away_s: float
    """So long after it comes back."""
    silent: bool = False
    """Its gateway does not notice: no reset comes."""
    forgets: int = 0
    """Last events that it has not kept."""


@dataclass(frozen=True, slots=True)
class Order:
    """What one client does: a value, so that a failing plan can be printed and shortened."""

    number: int
    at_s: float
    gateway: int
    prompt: tuple[int, ...]
    max_tokens: int
    choices: int
    seed: int
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    habit: Habit = "read"
    after: int = 0
    """Tokens after which it cancels, leaves or dawdles."""
    deadline_s: float | None = None
    priority: Literal["interactive", "standard", "batch"] = "standard"
    by_id: bool = False
    """It comes back to its stream by the stream's id; else it sends its request again with what it has."""
    breaks: tuple[Break, ...] = ()
    patience_s: float = 0.0
    """Without an event for so long it tries another gateway; 0: it waits."""
    insists: bool = False
    """It asks for its stream once more after it has cancelled it."""
    stranger: bool = False
    """Somebody of another tenant asks for its stream, too."""


def draw(rng: random.Random, number: int, span_s: float, gateways: int) -> Order:
    """A client by chance."""
    prompt = tuple(rng.randrange(32, 127) for _ in range(rng.choice((3, 20, 70, 140))))
    max_tokens = rng.choice((1, 8, 30, 60, 100, 160))
    seed = rng.getrandbits(31)
    habit: Habit = rng.choices(("read", "cancel", "leave", "kill", "dawdle", "deadline"), weights=(60, 8, 8, 10, 4, 5))[
        0
    ]
    if habit in ("cancel", "leave", "kill") and rng.random() < 0.5:
        prompt, max_tokens = prompt[:20], _LONG  # would still run at the end if nobody stopped it
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    if rng.random() < 0.25:
        at = rng.randrange(min(max_tokens, 100))
        text = "".join(map(chr, tokens_of(prompt, seed, 0, max_tokens)))
        stop = (text[at : at + rng.choice((1, 2, 3))],)
    elif rng.random() < 0.2:
        stop_tokens = (tokens_of(prompt, seed, 0, max_tokens)[rng.randrange(min(max_tokens, 100))],)
    by_id = rng.random() < 0.7
    return Order(
        number=number,
        at_s=rng.choice((0.3, 1.0, rng.uniform(0.0, span_s), rng.uniform(0.0, span_s))),
        gateway=rng.randrange(gateways),
        prompt=prompt,
        max_tokens=max_tokens,
        choices=rng.choice((1, 1, 1, 2, 3)) if len(prompt) + max_tokens <= _SMALL else 1,
        seed=seed,
        stop=stop,
        stop_tokens=stop_tokens,
        habit=habit,
        after=rng.randrange(min(max_tokens, 60)),
        deadline_s=rng.uniform(0.3, 4.0) if habit == "deadline" else None,
        priority=rng.choice(("interactive", "standard", "batch")),
        by_id=by_id,
        breaks=_breaks(rng, max_tokens) if by_id and rng.random() < 0.6 else (),
        patience_s=rng.uniform(1.5, 4.0) if by_id and rng.random() < 0.3 else 0.0,
        insists=by_id and rng.random() < 0.7,
        stranger=by_id and rng.random() < 0.3,
    )


def _breaks(rng: random.Random, max_tokens: int) -> tuple[Break, ...]:
    places = sorted(rng.randrange(max_tokens + 1) for _ in range(rng.choice((1, 1, 2, 3))))
    return tuple(
        Break(
            after=place,
            away_s=rng.choice((0.0, 0.01, 0.1, 0.5, 2.0, 7.0)),
            silent=rng.random() < 0.3,
            forgets=rng.choice((0, 0, 1, 5)),
        )
        for place in places
    )


@cache
def tokens_of(prompt: tuple[int, ...], seed: int, choice: int, count: int) -> tuple[int, ...]:
    """What every worker produces."""
    digest = prompt_digest(prompt)
    return tuple(echo_token(digest, seed, choice, index) for index in range(count))


@dataclass(frozen=True, slots=True)
class Expected:
    """The whole of one choice."""

    tokens: tuple[int, ...]
    text: str
    finish: str


def expected(order: Order, choice: int) -> Expected:
    """By the rules of the API, computed without any of the code that is tested."""
    tokens = tokens_of(order.prompt, order.seed, choice, order.max_tokens)
    finish = "length"
    for index, token in enumerate(tokens):
        if token in order.stop_tokens:
            tokens, finish = tokens[: index + 1], "stop"
            break
    text = "".join(map(chr, tokens))
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in order.stop if stop and stop in text]
    if ends:
        end, begin = min(ends)
        return Expected(tokens[:end], text[:begin], "stop")
    return Expected(tokens, text, finish)
