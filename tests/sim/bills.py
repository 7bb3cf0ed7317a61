"""What tenants must have paid at the end of a request, by books of the simulation's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from scheduler.events import Submitted
from scheduler.requests import LiveRequest
from scheduler.state import State
from tests.sim.copies import Copies

COMES_BACK = frozenset(
    {"", "client_gone", "slow_reader", "deadline", "broken", "gateway_lost", "unavailable", "deadline_exceeded"}
)
"""How requests end that may go on later: well, or by nobody's decision to stop them for good."""


@dataclass(frozen=True, slots=True)
class Paid:
    """What a tenant has paid for: the prompt, and so many tokens of each choice."""

    prompt: bool
    tokens: list[int]
    broken: bool = False


class Bills:
    """One leader's. Charged must be the prompt, if it ever began, and every token of which nobody had known; once."""

    def __init__(self, state: State, charged: dict[int, float], fail: Callable[[str, str], None]) -> None:
        self._state, self._charged, self._fail = state, charged, fail
        self._lives: dict[str, tuple[LiveRequest, Paid]] = {}
        """Accepted requests, with what had been paid for before."""
        self._began: set[str] = set()
        """Those of them of which an attempt has begun."""
        self._over: dict[str, Paid] = {}
        """Those that are over and may come back."""

    def inherited(self, copies: Copies) -> None:
        """An earlier leader's journal: what was paid under it, as far as that leader had told."""
        for name, copy in copies.entries.items():
            if copy.paid is not None:
                self._over[name] = copy.paid

    def accepted(self, event: Submitted, live: LiveRequest) -> None:
        """A request begins, or goes on: what comes with output was charged by an earlier leader, what was stopped
        here, or is remembered of an earlier leader, is where it was."""
        request = event.request
        brought = [0] * request.choices
        for held in request.resume:
            brought[held.choice] = len(held.token_ids)
        before = self._over.pop(request.request_id, None)
        paid = Paid(bool(request.resume), brought)
        if before is not None and (before.broken or event.claim or request.resume):
            paid = Paid(before.prompt or paid.prompt, [max(pair) for pair in zip(brought, before.tokens, strict=True)])
        self._lives[live.id] = live, paid

    def began(self, request_id: str) -> None:
        """An attempt begins."""
        self._began.add(request_id)

    def unwanted(self, request_id: str, choice: int, keep_until: int) -> None:
        """A gateway has no use for tokens from an index on: what was paid for them is given back."""
        live, paid = self._lives.get(request_id, (None, None))
        if live is None or paid is None or choice >= len(live.choices) or live.choices[choice].finished:
            return
        tokens = list(paid.tokens)
        refund = tokens[choice] - keep_until
        if refund > 0:
            tokens[choice] = keep_until
            self._lives[request_id] = live, replace(paid, tokens=tokens)
            self._charged[id(live)] = self._charged.get(id(live), 0.0) + refund

    def so_far(self, request_id: str) -> Paid | None:
        """What has been paid for up to now."""
        live, before = self._lives.get(request_id, (None, None))
        if live is None or before is None:
            return self._over.get(request_id)
        return Paid(before.prompt or request_id in self._began, _tokens(live, before), True)

    def over(self, request_id: str, error: str) -> None:
        """A request is over."""
        live, before = self._lives.pop(request_id, (None, Paid(False, [])))
        began = request_id in self._began
        self._began.discard(request_id)
        if live is None:
            if request_id in self._over:  # it had all there was to get when it came
                self._over[request_id] = replace(self._over[request_id], broken=bool(error))
            return
        tokens = _tokens(live, before)
        due = sum(tokens) - sum(before.tokens)
        if began and not before.prompt:
            due += len(live.request.token_ids)
        charged = self._charged.pop(id(live), 0.0)
        if abs(charged - due) > 0.5 and not self._state.counters["diverged"]:
            self._fail("each token is charged once", f"{request_id}: {charged:.0f} for {due}")
        if error in COMES_BACK:
            self._over[request_id] = Paid(before.prompt or began, tokens, bool(error))

    def forgotten(self, request_id: str) -> None:
        """Nothing is remembered of it any more."""
        self._over.pop(request_id, None)


def _tokens(live: LiveRequest, before: Paid) -> list[int]:
    """A choice that ended before what was paid for has had its rest taken back."""
    return [
        len(choice.tokens) if choice.finished else max(len(choice.tokens), paid)
        for choice, paid in zip(live.choices, before.tokens, strict=True)
    ]
