"""What tenants must have paid at the end of a request, by books of the simulation's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scheduler.events import Submitted
from scheduler.requests import LiveRequest
from scheduler.state import State

_COMES_BACK = frozenset(
    {"", "client_gone", "slow_reader", "deadline", "broken", "gateway_lost", "unavailable", "deadline_exceeded"}
)
"""How requests end that may go on later: well, or by nobody's decision to stop them for good."""


@dataclass(frozen=True, slots=True)
class Paid:
    """What a tenant has paid for: the prompt, and so many tokens of each choice."""

    prompt: bool
    tokens: list[int]
    broken: bool = False
    at: float = 0.0


class Bills:
    """One leader's. Charged must be the prompt, if it ever began, and every token of which nobody had known; once."""

    def __init__(self, state: State, charged: dict[int, float], fail: Callable[[str, str], None]) -> None:
        self._state, self._charged, self._fail = state, charged, fail
        self._lives: dict[str, tuple[LiveRequest, Paid]] = {}
        """Accepted requests, with what had been paid for before."""
        self._over: dict[str, Paid] = {}
        """Those that are over and may come back."""

    def accepted(self, event: Submitted, live: LiveRequest, now: float) -> None:
        """A request begins, or goes on: what comes with output was charged by an earlier leader, what was stopped
        here is where it was."""
        request = event.request
        brought = [0] * request.choices
        for held in request.resume:
            brought[held.choice] = len(held.token_ids)
        before = self._over.pop(request.request_id, None)
        paid = Paid(bool(request.resume), brought)
        if (
            before is not None
            and (before.broken or event.claim or request.resume)
            and now < before.at + self._state.policy.journal_ttl_s
        ):
            paid = Paid(before.prompt or paid.prompt, [max(pair) for pair in zip(brought, before.tokens, strict=True)])
        self._lives[live.id] = live, paid

    def over(self, request_id: str, error: str, now: float) -> None:
        """A request is over."""
        live, before = self._lives.pop(request_id, (None, Paid(False, [])))
        if live is None or self._state.counters["diverged"]:
            return
        began = live.attempts > live.attempts_before
        # A choice that ended before what was paid for has had its rest taken back.
        tokens = [
            len(choice.tokens) if choice.finished else max(len(choice.tokens), paid)
            for choice, paid in zip(live.choices, before.tokens, strict=True)
        ]
        due = sum(tokens) - sum(before.tokens)
        if began and not before.prompt:
            due += len(live.request.token_ids)
        charged = self._charged.pop(id(live), 0.0)
        if abs(charged - due) > 0.5:
            self._fail("each token is charged once", f"{request_id}: {charged:.0f} for {due}")
        if error in _COMES_BACK:
            self._over[request_id] = Paid(before.prompt or began, tokens, bool(error), now)
