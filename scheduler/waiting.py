"""Requests that wait for a worker: per model version in fair order (`fairness.py`), with bounded overtaking."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llmos.internal.v1 import registry_pb2
from scheduler import service
from scheduler.fairness import STANDARD, Account, Entry, FairQueue, Item, Look
from scheduler.policy import Policy
from scheduler.requests import LiveRequest, ModelKey

_TRIES = 4
"""Requests of one tenant that are tried in a row before others have their turn."""


@dataclass(frozen=True, slots=True)
class Admission:
    """What one look at a queue came to."""

    taken: int
    """Requests that began."""
    wanting: list[LiveRequest]
    """Requests with an adapter that found no worker, most urgent first; one of each adapter that is loaded nowhere."""


class WaitingRoom:
    """A request is in it at most once, and has an account in its model's queue from its first wait to its end."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._queues: dict[ModelKey, FairQueue] = {}
        self._stranded: dict[ModelKey, dict[str, Item]] = {}
        """Too large for every worker at present: they neither hold the others up nor are looked at each time."""
        self._lacking: dict[ModelKey, dict[ModelKey, dict[str, Item]]] = {}
        """The same for those whose adapter is loaded nowhere: by model, then by adapter."""
        self._reach: dict[ModelKey, float] = {}
        self._entries: dict[str, Entry] = {}
        self._inherited: dict[str, list[registry_pb2.TenantService]] = {}
        """Counters of earlier leaders, by model; for queues that are yet to come."""
        self._serial = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def tokens(self) -> int:
        """That those who wait are expected to cost."""
        return sum(queue.tokens for queue in self._queues.values())

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def queue(self, key: ModelKey) -> FairQueue:
        """The queue of a model version; made when it is first asked for."""
        found = self._queues.get(key)
        if found is None:
            policy = self._policy
            found = self._queues[key] = FairQueue(policy.shares, policy.head_start_tokens, policy.tenants_limit)
            service.restore(found, self._inherited.get(key[0], ()))
        return found

    def queues(self) -> list[FairQueue]:
        """Of all models."""
        return list(self._queues.values())

    def forget(self, gone: Callable[[ModelKey], bool]) -> None:
        """Drop the queues of models that are `gone`, where nobody waits and nothing runs."""
        for key, queue in list(self._queues.items()):
            aside = key in self._stranded or key in self._lacking
            if not aside and not len(queue) and not any(one.busy for one in queue.classes) and gone(key):
                del self._queues[key]

    def crowded(self, key: ModelKey) -> bool:
        """Somebody waits for this model."""
        queue = self._queues.get(key)
        return bool(queue is not None and len(queue)) or key in self._stranded or key in self._lacking

    def short(self, key: ModelKey) -> bool:
        """Everybody who waits for this model is looked at each time: a new one may fit where others do not."""
        return len(self.queue(key)) <= self._policy.lookahead

    def leads(self, live: LiveRequest) -> bool:
        """It goes before everybody else who waits for its model."""
        return self.queue(live.key).leads(live)

    def keys(self) -> list[ModelKey]:
        """Model versions that somebody waits for, in order of name."""
        waited_for = {key for key, queue in self._queues.items() if len(queue)}
        return sorted(waited_for | self._stranded.keys() | self._lacking.keys())

    def waiting_for(self, key: ModelKey) -> Iterator[LiveRequest]:
        """Everybody who waits for a model version, in no order."""
        items = [*self.queue(key).items(), *self._stranded.get(key, {}).values()]
        for lacking in self._lacking.get(key, {}).values():
            items += lacking.values()
        return (entry.live for _, _, entry in items)

    def stranded(self) -> list[LiveRequest]:
        """Those that no worker could hold when they were last looked at."""
        return [entry.live for items in self._stranded.values() for _, _, entry in items.values()]

    def recall(self) -> None:
        """Look at those who stepped aside again, next time."""
        for key in list(self._stranded):
            self._recall(key)
        for key in list(self._lacking):
            self._recall_lacking(key, lambda adapter: False)

    def account(self, live: LiveRequest) -> Account:
        """Where a request is charged: its tenant's account in its class."""
        if self._policy.order == "fcfs":
            return self.queue(live.key).account(STANDARD, "", 1)
        return self.queue(live.key).account(live.rank, live.request.tenant, live.request.tenant_weight)

    def cost(self, live: LiveRequest) -> int:
        """Tokens that a request is expected to cost yet, its prompt included."""
        queue = self._queues.get(live.key)
        left = live.tokens_left if queue is None else queue.forecast.output_tokens(live.tokens_left)
        return len(live.request.token_ids) + left

    def push(self, live: LiveRequest, now: float) -> None:
        """Begin to wait."""
        account = live.account = self.account(live)
        live.waits_since = now
        entry = Entry(live, account, self.cost(live))
        self._entries[live.id] = entry
        self._serial += 1
        due = live.accepted_at if self._policy.order == "fcfs" else self.due_at(live)
        self.queue(live.key).push((due, self._serial, entry))

    def due_at(self, live: LiveRequest) -> float:
        """When a request should have begun: its class's patience, or the client's deadline if that is earlier."""
        return min(live.accepted_at + self._policy.patience_s[live.rank], live.deadline_at)

    def discard(self, live: LiveRequest) -> bool:
        """Stop waiting; whether it did."""
        entry = self._entries.pop(live.id, None)
        if entry is None:
            return False
        entry.gone = True
        if not self._discard_aside(live):
            self.queue(live.key).left(entry)
            entry.account.discount()
        return True

    def admit(
        self,
        key: ModelKey,
        start: Callable[[LiveRequest], bool],
        reach: float = math.inf,
        absent: Callable[[ModelKey], bool] = lambda adapter: False,
        most: int | None = None,
    ) -> Admission:
        """Offer the first requests to `start`, which says whether it took one; it may also end one.

        Looks a few places past one that does not fit (`most`; by default as the policy says), so that a large request
        does not idle the fleet; one that was overtaken too often is not overtaken any more. Requests of more than
        `reach` KV blocks fit nowhere, whoever else ends: they step aside until the reach grows or they are recalled. So
        do those whose adapter is `absent`, loaded nowhere: room that is kept for them would help nobody.
        """
        if reach > self._reach.get(key, 0):
            self._recall(key)
        self._recall_lacking(key, absent)
        self._reach[key] = reach
        queue = self.queue(key)
        look = Look(queue, _TRIES)
        taken = 0
        most = self._policy.lookahead if most is None else most
        while reach and len(look.failed) < most and (item := look.next()) is not None:
            entry = item[2]
            if self._step_aside(item, reach, absent):
                queue.left(entry)
            elif start(entry.live):
                taken += 1
                del self._entries[entry.live.id]
                queue.left(entry)
                for _, _, other in look.failed:
                    other.overtaken += 1
                if any(other.overtaken >= self._policy.bypass_limit for _, _, other in look.failed):
                    break
            elif not entry.gone:
                look.fail(item)
                if entry.overtaken >= self._policy.bypass_limit:
                    break
        look.close()
        return Admission(taken, self._wanting(key, look.failed))

    # -- service -----------------------------------------------------------------------------------------------------

    def service(self) -> list[registry_pb2.TenantService]:
        """What a new leader must know of the service that tenants have had."""
        return service.counters(self._queues)

    def inherit(self, counters: list[registry_pb2.TenantService]) -> None:
        """Take over what an earlier leader knew."""
        for counter in counters:
            self._inherited.setdefault(counter.model, []).append(counter)
        for key, queue in self._queues.items():
            service.restore(queue, self._inherited.get(key[0], ()))

    # -- aside -------------------------------------------------------------------------------------------------------

    def _step_aside(self, item: Item, reach: float, absent: Callable[[ModelKey], bool]) -> bool:
        live = item[2].live
        if live.blocks > reach:
            self._stranded.setdefault(live.key, {})[live.id] = item
        elif live.adapter is not None and absent(live.adapter):
            self._lacking.setdefault(live.key, {}).setdefault(live.adapter, {})[live.id] = item
        else:
            return False
        return True

    def _wanting(self, key: ModelKey, passed: list[Item]) -> list[LiveRequest]:
        # They stepped aside in order of urgency, since the last recall at least: the first one speaks for the others.
        first = [next(iter(items.values())) for items in self._lacking.get(key, {}).values()]
        items = sorted(first + [item for item in passed if item[2].live.adapter is not None])
        return [entry.live for _, _, entry in items]

    def _discard_aside(self, live: LiveRequest) -> bool:
        stranded = self._stranded.get(live.key, {})
        if stranded.pop(live.id, None) is not None:
            if not stranded:
                del self._stranded[live.key]
            return True
        lacking = self._lacking.get(live.key, {})
        if live.adapter is None or lacking.get(live.adapter, {}).pop(live.id, None) is None:
            return False
        if not lacking[live.adapter]:
            del lacking[live.adapter]
        if not lacking:
            del self._lacking[live.key]
        return True

    def _recall(self, key: ModelKey) -> None:
        for item in self._stranded.pop(key, {}).values():
            self.queue(key).push(item)

    def _recall_lacking(self, key: ModelKey, absent: Callable[[ModelKey], bool]) -> None:
        lacking = self._lacking.pop(key, {})
        for adapter, items in lacking.items():
            if absent(adapter):
                self._lacking.setdefault(key, {})[adapter] = items
                continue
            for item in items.values():
                self.queue(key).push(item)
