"""Classes of service as OpenAI's API names them, by `service_tier`. A key's class is the best that it may have."""

from __future__ import annotations

from typing import Literal

from llmos.keys import Priority

Tier = Literal["auto", "default", "flex", "scale", "priority"]

_CLASSES: dict[Tier, Priority] = {"priority": "interactive", "default": "standard", "flex": "batch"}
_TIERS: dict[Priority, Tier] = {name: tier for tier, name in _CLASSES.items()}
_ORDER: tuple[Priority, ...] = ("interactive", "standard", "batch")


def class_of(tier: Tier | None) -> Priority | None:
    """The class that is asked for; None (`auto`, `scale`, nothing): the key's."""
    return None if tier is None else _CLASSES.get(tier)


def granted(ceiling: Priority, asked: Priority | None) -> Priority:
    """The class that a request gets: what is asked for, or the key's if that is lower."""
    return ceiling if asked is None else max(ceiling, asked, key=_ORDER.index)


def tier_of(priority: Priority) -> Tier:
    """How a response names the class that was granted."""
    return _TIERS[priority]
