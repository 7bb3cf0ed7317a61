"""What a tenant may have of the fleet: its weight among others, and its limits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmos.errors import ConfigError

MAX_WEIGHT = 1000
MAX_LIMIT = 2**32 - 1


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """A tenant's part of the fleet. Limits hold over the whole fleet; 0: none."""

    weight: int = 1
    """Share of its class, beside other tenants' weights; 1 to 1,000."""
    max_requests: int = 0
    """Requests that wait or run."""
    tokens_per_minute: int = 0
    """Tokens charged per minute, prompts included."""

    def __post_init__(self) -> None:
        """Raises ConfigError where a value is out of bounds."""
        if not 1 <= self.weight <= MAX_WEIGHT:
            raise ConfigError(f"A weight is a number from 1 to {MAX_WEIGHT}.", param="weight")
        for name in ("max_requests", "tokens_per_minute"):
            if not 0 <= getattr(self, name) <= MAX_LIMIT:
                raise ConfigError(f"{name} must be from 0 (no limit) to {MAX_LIMIT}.", param=name)


@dataclass(frozen=True, slots=True)
class LimitsChange:
    """What is to become of a tenant's limits; None: stays as it is."""

    weight: int | None = None
    max_requests: int | None = None
    tokens_per_minute: int | None = None

    def applied(self, limits: TenantLimits) -> TenantLimits:
        """`limits` with the change. Raises ConfigError."""
        given = {name: value for name in self.__slots__ if (value := getattr(self, name)) is not None}
        return replace(limits, **given)
