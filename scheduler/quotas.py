"""Tenants' limits over the whole fleet: requests at once, tokens per minute. A new leader begins with full buckets."""

from __future__ import annotations

from dataclasses import dataclass

from llmos.errors import QuotaExceeded
from llmos.internal.v1 import request_pb2


@dataclass(slots=True)
class Usage:
    """What one tenant uses. Tokens are a bucket that holds a minute's worth and fills evenly."""

    per_minute: int
    level: float
    at: float
    live: int = 0
    """Requests that wait or run."""
    pending: int = 0
    """Prompt tokens of those that were not charged yet."""

    def refill(self, per_minute: int, now: float) -> None:
        """Let time pass, under the limit that holds now."""
        self.level = min(per_minute, self.level + (now - self.at) / 60 * self.per_minute)
        self.per_minute, self.at = per_minute, now

    def idle(self, now: float) -> bool:
        """Nothing of it would be missed."""
        return not self.live and self.level + (now - self.at) / 60 * self.per_minute >= self.per_minute


class Quotas:
    """By tenant; of those only that have a quota and used some of it."""

    def __init__(self) -> None:
        self._usages: dict[str, Usage] = {}

    def __len__(self) -> int:
        return len(self._usages)

    def enter(self, request: request_pb2.Request, now: float) -> Usage | None:
        """Count a request in; None: its tenant has no quota. Raises QuotaExceeded, unless it is resumed."""
        if not request.HasField("quota"):
            return None
        quota, prompt = request.quota, len(request.token_ids)
        usage = self._usages.get(request.tenant)
        if usage is None:
            usage = self._usages[request.tenant] = Usage(quota.tokens_per_minute, float(quota.tokens_per_minute), now)
        usage.refill(quota.tokens_per_minute, now)
        if not request.resume:
            _check_requests(usage, quota.max_requests)
            _check_tokens(usage, prompt)
            usage.pending += prompt
        usage.live += 1
        return usage

    def forget(self, now: float) -> None:
        """Drop what would not be missed; now and then."""
        for tenant in [tenant for tenant, usage in self._usages.items() if usage.idle(now)]:
            del self._usages[tenant]


def _check_requests(usage: Usage, limit: int) -> None:
    if limit and usage.live >= limit:
        raise QuotaExceeded(
            f"The quota 'max_requests' allows {limit} requests at once; wait for one to end.", retry_after_s=1.0
        )


def _check_tokens(usage: Usage, prompt: int) -> None:
    """A prompt that is larger than the bucket passes when the bucket is full."""
    limit = usage.per_minute
    missing = min(limit, prompt) - (usage.level - usage.pending)
    if limit and missing > 0:
        raise QuotaExceeded(
            f"The quota 'tokens_per_minute' allows {limit} tokens a minute, and they are used up.",
            retry_after_s=60 * missing / limit,
        )
