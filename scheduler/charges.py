"""What tenants are charged, and when: a prompt as its request begins, an output token when it first comes.

Each index is charged once: what is computed again after a migration or a preemption is the system's cost.
"""

from __future__ import annotations

from scheduler.forecast import Forecast
from scheduler.requests import Choice, LiveRequest


def started(live: LiveRequest) -> None:
    """An attempt begins."""
    account = live.account
    assert account is not None
    account.owner.runs(account, live)
    if live.refund:
        account.charge(-live.refund)
        live.refund = 0.0
    if not live.prompt_charged:
        _settle(live)
        live.prompt_charged = True
        _charge(live, len(live.request.token_ids))


def inherited(live: LiveRequest) -> None:
    """The prompt of a request that has just come was paid for in an earlier life of it."""
    _settle(live)
    live.prompt_charged = live.prompt_inherited = True


def stopped(live: LiveRequest) -> None:
    """Its attempt is over."""
    account = live.account
    assert account is not None
    account.owner.rests(account, live)


def moved(live: LiveRequest) -> None:
    """The running request is charged elsewhere from now on: `live.account` is new."""
    account = live.account
    assert account is not None
    account.owner.runs(account, live)


def learned(forecast: Forecast, live: LiveRequest, now: float) -> None:
    """A request is complete: what others like it will produce, and how fast."""
    attempt, request = live.attempt, live.request
    if request.max_tokens and live.tokens_out:
        forecast.used.add(live.tokens_out / (request.max_tokens * request.choices))
    if attempt is not None and attempt.first_at and attempt.produced > request.choices:
        steps = attempt.produced / request.choices - 1
        forecast.gap_s.add((now - attempt.first_at) / steps)


def ended(live: LiveRequest) -> None:
    """The request is over."""
    if live.usage is not None:
        _settle(live)
        live.usage.live -= 1


def produced(live: LiveRequest, choice: Choice) -> None:
    """A choice has got output."""
    fresh = len(choice.tokens) - choice.charged
    if fresh > 0:
        choice.charged += fresh
        _charge(live, fresh)


def cut(live: LiveRequest, choice: Choice, keep_until: int) -> None:
    """Tokens from an index on are not wanted: they cost nothing."""
    unwanted = choice.charged - keep_until
    if unwanted > 0:
        choice.charged = keep_until
        _charge(live, -unwanted)


def cached(live: LiveRequest, tokens: int, cost: float) -> None:
    """So many prompt tokens were found in a prefix cache; they cost less. Of the request's first attempt, or its hedge,
    only: later ones find what was computed for it before."""
    if live.attempt is not None and live.attempt.first and live.prompt_charged and not live.prompt_inherited:
        _charge(live, -min(tokens, len(live.request.token_ids)) * (1.0 - cost))


def _charge(live: LiveRequest, tokens: float) -> None:
    if live.account is not None:
        live.account.charge(tokens)
    else:  # it has just come, or waits for its model to be known
        assert tokens <= 0
        live.refund -= tokens
    if live.usage is not None:
        live.usage.level -= tokens


def _settle(live: LiveRequest) -> None:
    """Its prompt is not to be expected any more."""
    if live.usage is not None and not live.prompt_charged:
        live.usage.pending -= len(live.request.token_ids)
