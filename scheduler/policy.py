"""The core's own numbers. Every one has a default that is right for a laptop and for a small fleet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class PlacementWeights:
    """What counts how much where a request is placed, in seconds of its own waiting. 0 switches a score off."""

    untried: float = 1e6
    """A worker on which it was lost before."""
    numerics: float = 1e5
    """A worker on which it would not continue with the same bytes."""
    home: float = 1e4
    """Any other worker than the one that still runs its earlier attempt."""
    trial: float = 1e3
    """A worker that is not to be tried, over one that is."""
    ttft: float = 1.0
    """Each second until its first token, as predicted."""
    work: float = 0.5
    """Each second of computing its prompt, besides that it delays its own first token: others come later."""
    disturbance: float = 0.05
    """Each second by which its prompt holds up a stream that runs there."""
    decode: float = 0.02
    """Each second of decoding its answer, as predicted."""
    tail: float = 0.1
    """Each second that slow prefills and slow steps there take longer than expected."""
    overlap: float = 0.002
    """A prompt of which nothing is cached, over one that is cached."""
    pressure: float = 0.005
    """A worker whose KV blocks are all taken, over one with all blocks free."""
    spread: float = 0.001
    """A worker that runs nothing but the same tenant's requests."""
    tie_share: float = 0.1
    """Workers whose costs differ by less than this share count as equal: predictions are no better."""
    tie_limit_s: float = 0.05
    """The same in seconds, at most."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How patient, how bounded and how strict the core is."""

    queue_limit: int = 1024
    """Most requests that wait for a worker; one more is refused as overloaded."""
    queue_token_limit: int = 4_194_304
    """Most tokens, prompts and expected answers, that wait for a worker."""
    ttft_bounds_s: tuple[float, float, float] = (30.0, 120.0, 1800.0)
    """Longest predicted time to the first token with which a request of each class is accepted."""
    codel_interval_s: float = 1.0
    """Seconds that a tenant's queue may be slower than half of that bound before some of it is shed."""
    no_worker_grace_s: float = 60.0
    """Seconds that a request waits while no connected worker could ever serve its model."""
    gateway_grace_s: float = 1.5
    """Seconds that requests outlive their gateway's stream, for it to come back and take them up."""
    settle_s: float = 1.0
    """Seconds that gateways and workers have to come after an election; what a worker runs is kept for them as long."""
    settle_limit_s: float = 3.0
    """The same while registered workers have not reported yet: one of them may be dead."""
    lost_attempt_s: float = 5.0
    """Seconds that a worker may say that it runs nothing before what it ought to run counts as lost."""
    tombstone_ttl_s: float = 120.0
    """Seconds that a cancelled id refuses to start. Workers remember epochs of ended attempts as long."""
    tombstone_limit: int = 262_144
    """Most tombstones, and most ended requests whose number of attempts is remembered; the oldest give way."""
    journal_ttl_s: float = 120.0
    """Seconds that a stream which broke or ended is remembered for its client to come back."""
    journal_bytes: int = 128 * 1024 * 1024
    """Most bytes of such streams; the oldest give way."""
    journal_tenant_bytes: int = 32 * 1024 * 1024
    """The same of one tenant."""
    max_retries: int = 3
    """Attempts that may fail by a worker's own word before the request does."""
    avoid_s: float = 5.0
    """Seconds that a request which stalled on a worker waits for another one that could hold it."""
    max_attempts: int = 64
    """Attempts of any kind before a request is given up."""
    hedge: bool = True
    """Begin a second attempt of a request whose first token is late on another worker."""
    retry_base_s: float = 0.05
    """Pause before the first retry; doubles with each."""
    quarantine_s: float = 600.0
    """Seconds that a request which workers died of is refused."""
    quarantine_limit: int = 4096
    """Most such requests that are remembered."""
    lookahead: int = 16
    """Waiting requests of a model that are tried when the first one does not fit."""
    bypass_limit: int = 64
    """How often a waiting request may be overtaken by one that fits."""
    order: Literal["fair", "fcfs"] = "fair"
    """`fair`: by class and tenant. `fcfs`: by arrival alone, to compare with."""
    shares: tuple[float, float, float] = (80.0, 15.0, 5.0)
    """Least shares of the interactive, the standard and the batch class while all of them wait; they are relative."""
    head_start_tokens: float = 4096.0
    """Tokens that a class may fall short of its share before it goes ahead of a class above it."""
    patience_s: tuple[float, float, float] = (10.0, 30.0, 300.0)
    """Seconds after its arrival at which a request of each class counts as due, if its deadline is not earlier."""
    tenants_limit: int = 4096
    """Most tenants of a class whose service is remembered; those who were idle longest are forgotten first."""
    cached_cost: float = 0.1
    """What a prompt token that was found in a prefix cache is charged at; others cost 1."""
    max_preemptions: int = 4
    """How often a request may lose its place to a higher class; then it keeps it."""
    candidates: int = 16
    """Most workers that are scored for one placement."""
    weights: PlacementWeights = field(default_factory=PlacementWeights)
    """What counts how much where a request is placed."""
    min_kv_tokens: int = 2048
    """Tokens of KV cache below which loading a model makes no sense (or its context, if shorter)."""
    adapter_slots: int = 16
    """Most adapters that are loaded beside one model on a worker; the one used longest ago gives way to another."""
    adapter_wanted_s: float = 0.1
    """Pause before another worker is looked for that could load an adapter."""
    await_promises: bool = False
    """Load nothing before the allocations that stand at the election are known."""
    replica_up_s: float = 1.0
    """Seconds of need before a model gets another replica."""
    replica_down_s: float = 30.0
    """Seconds without need before a replica goes; at least twice the time that loading it takes."""
    replica_idle_s: float = 300.0
    """Seconds without a request before a model's last replica goes, if its allocation lets it."""
    replica_requests: int = 16
    """Requests that a replica is meant to run at a time, unless its allocation says otherwise."""
    unload_drain_s: float = 10.0
    """Seconds that requests have to finish on a replica that goes; then they move to another."""
    load_bytes_per_s: float = 2e8
    """How fast weights are thought to be loaded, until it was measured."""
    ledger_s: float = 0.5
    """Between two looks at replicas and jobs."""
    max_choices: int = 16
    """Most choices of one request."""
