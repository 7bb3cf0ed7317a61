"""Say no at once instead of late: bounds of the queue, predictions on arrival, shedding of what would be late anyway.

Three guards, each for what the one before it lets through:

1. On arrival: a request that would get its first token after its class's bound, or its last one after the client's
   deadline, is refused with the time after which it might be accepted. Full queues take nothing more from tenants who
   fill them; others push the longest queue's last request out.
2. When its turn comes: a request that can't be finished within the client's deadline is shed instead of computed.
3. When its turn comes: CoDel, per tenant, sheds while the time in the queue stays above half of the class's bound.

Only requests that nothing was computed for are refused or shed.
"""

from __future__ import annotations

import math
import zlib

from llmos.errors import Overloaded
from scheduler.fairness import Account, FairQueue
from scheduler.lifecycle import fail
from scheduler.requests import LiveRequest
from scheduler.state import Outbox, State

_LEAST_S, _MOST_S = 1.0, 60.0
"""Bounds of Retry-After."""


def observe(state: State, now: float) -> None:
    """Every tick: how fast the queues move."""
    for queue in state.waiting.queues():
        queue.forecast.observe(queue.served, len(queue), now)


def check(state: State, live: LiveRequest, now: float, out: Outbox, *, parked: bool) -> None:
    """Raise Overloaded if a new request should not wait. May end another one to make room for it.

    One whose model is not known yet (`parked`) is only counted.
    """
    _check_bounds(state, live, now, out, parked)
    if parked:
        return
    queue = state.waiting.queue(live.key)
    account = state.waiting.account(live)
    wait = wait_s(queue, account)
    if wait <= 0:
        return
    late = wait + queue.forecast.first.seconds(0) - state.policy.ttft_bounds_s[live.rank]
    late = max(late, wait + needed_s(queue, live) - (live.deadline_at - now))
    if late > 0:
        state.counters["overloaded"] += 1
        raise Overloaded(
            f"The queue is too long for this request: it would begin in about {wait:.0f} s. Try again later.",
            retry_after_s=_spread(live.id, late),
        )


def wait_s(queue: FairQueue, account: Account) -> float:
    """Seconds until a request that comes now gets its turn; 0: at once, or not known.

    The lesser of two bounds of fair service: all that waits in its class and above, at the whole speed; what its
    tenant has waiting, at the tenant's share of it.
    """
    rate = queue.forecast.rate
    if rate <= 0:
        return 0.0
    mine = account.owner
    ahead = [one for one in queue.classes if one.waiting and one.rank <= mine.rank]
    others = sum(one.share for one in queue.classes if one.waiting and one is not mine) + mine.share
    above = sum(one.share for one in ahead if one is not mine) + mine.share
    everybody = sum(one.tokens for one in ahead) / (rate * above / others)
    weights = mine.weights + (0 if account.waiting else account.weight)
    own = account.tokens / (rate * mine.share / others * account.weight / weights)
    return min(everybody, own)


def needed_s(queue: FairQueue, live: LiveRequest) -> float:
    """Seconds from its dispatch to its last token, as far as they are known; to its first one if its deadline never
    left time for the last."""
    output = queue.forecast.output_tokens(live.request.max_tokens)
    first, last = queue.forecast.service_s(len(live.request.token_ids), output)
    return last if live.accepted_at + last <= live.deadline_at else first


def hopeless(state: State, live: LiveRequest, now: float, out: Outbox) -> bool:
    """Whether its turn came too late for its deadline; then it is over."""
    if live.deadline_at == math.inf or not _fresh(live):
        return False
    if now + needed_s(state.waiting.queue(live.key), live) <= live.deadline_at or live.accepted_at == now:
        return False
    shed(state, live, now, out)
    return True


def stale(state: State, live: LiveRequest, now: float, out: Outbox) -> bool:
    """Whether CoDel sheds it instead of beginning it; then it is over."""
    account = live.account
    if account is None or account.waiting < 2 or not _fresh(live):
        return False
    target = state.policy.ttft_bounds_s[live.rank] / 2
    if not account.codel.drops(now - live.waits_since, target, state.policy.codel_interval_s, now):
        return False
    shed(state, live, now, out)
    return True


def shed(state: State, live: LiveRequest, now: float, out: Outbox) -> None:
    """End a request that waits and has cost nothing yet."""
    state.counters["shed"] += 1
    waiting = len(state.waiting.queue(live.key))
    pause = state.drain.retry_after_ms(waiting, now) / 1000
    error = Overloaded(
        "The queue is too long for this request; try again later.", retry_after_s=_spread(live.id, pause)
    )
    fail(state, live, error, out)


def _fresh(live: LiveRequest) -> bool:
    return not live.request.resume and live.attempts == live.attempts_before


def _check_bounds(state: State, live: LiveRequest, now: float, out: Outbox, parked: bool) -> None:
    waiting = len(state.waiting) + len(state.parked)
    tokens = state.waiting.tokens + state.waiting.cost(live)
    if waiting < state.policy.queue_limit and tokens <= state.policy.queue_token_limit:
        return
    victim = None if parked else _longest(state, live)
    if victim is not None and waiting <= state.policy.queue_limit:
        shed(state, victim, now, out)
        return
    state.counters["overloaded"] += 1
    pause = state.drain.retry_after_ms(waiting, now) / 1000
    raise Overloaded("Too many requests are waiting; try again later.", retry_after_s=_spread(live.id, pause))


def _longest(state: State, live: LiveRequest) -> LiveRequest | None:
    """A late request of the longest queue per weight in the lowest class, if the newcomer's claim is better."""
    queue = state.waiting.queue(live.key)
    mine = state.waiting.account(live)
    one = next((one for one in reversed(queue.classes) if one.waiting), None)
    if one is None or one.rank < mine.owner.rank:
        return None
    account = max((a for a in one.accounts.values() if a.waiting), key=lambda a: a.tokens / a.weight)
    if (
        account.owner is mine.owner
        and (mine.tokens + state.waiting.cost(live)) / mine.weight >= account.tokens / account.weight
    ):
        return None
    last = account.last()
    return last.live if last is not None and _fresh(last.live) else None


def _spread(request_id: str, seconds: float) -> float:
    """Bounded, and up to a quarter longer by a hash of the id: those refused together must not return together."""
    spread = 1.0 + (zlib.crc32(request_id.encode()) % 256) / 1024
    return min(_MOST_S, max(_LEAST_S, seconds * spread))
