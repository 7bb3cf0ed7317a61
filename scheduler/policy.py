"""The core's own numbers. Every one has a default that is right for a laptop and for a small fleet."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Policy:
    """How patient, how bounded and how strict the core is."""

    queue_limit: int = 1024
    """Most requests that wait for a worker; one more is refused as overloaded."""
    no_worker_grace_s: float = 60.0
    """Seconds that a request waits while no connected worker could ever serve its model."""
    gateway_grace_s: float = 1.5
    """Seconds that requests outlive their gateway's stream, for it to come back and take them up."""
    settle_s: float = 1.0
    """Seconds that gateways and workers have to come after an election; what a worker runs is kept for them as long."""
    settle_limit_s: float = 3.0
    """The same while registered workers have not reported yet: one of them may be dead."""
    tombstone_ttl_s: float = 120.0
    """Seconds that a cancelled id refuses to start. Workers remember epochs of ended attempts as long."""
    tombstone_limit: int = 262_144
    """Most tombstones, and most ended requests whose number of attempts is remembered; the oldest give way."""
    max_retries: int = 3
    """Attempts that may fail by a worker's own word before the request does."""
    max_attempts: int = 64
    """Attempts of any kind before a request is given up."""
    retry_base_s: float = 0.05
    """Pause before the first retry; doubles with each."""
    lookahead: int = 16
    """Waiting requests of a model that are tried when the first one does not fit."""
    bypass_limit: int = 64
    """How often a waiting request may be overtaken by one that fits."""
    candidates: int = 16
    """Most workers that are scored for one placement."""
    min_kv_tokens: int = 2048
    """Tokens of KV cache below which loading a model makes no sense (or its context, if shorter)."""
    adapter_slots: int = 16
    """Most adapters that are loaded beside one model on a worker; the one used longest ago gives way to another."""
    adapter_wanted_s: float = 0.1
    """Pause before another worker is looked for that could load an adapter."""
    max_choices: int = 16
    """Most choices of one request."""
