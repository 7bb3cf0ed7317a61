"""A worker as the core sees it: its record, its stream, its models and the blocks set aside on them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from llmos.internal.v1 import registry_pb2, request_pb2, work_pb2
from llmos.v1 import fleet_pb2
from scheduler.requests import Attempt, ModelKey
from scheduler.timing import Times
from scheduler.usage import Decay

LOADED = fleet_pb2.MODEL_STATE_LOADED
AVAILABLE = fleet_pb2.MODEL_STATE_AVAILABLE
HOPELESS = frozenset({fleet_pb2.MODEL_STATE_FAILED, fleet_pb2.MODEL_STATE_UNFIT})
_IN_MEMORY = frozenset({LOADED, fleet_pb2.MODEL_STATE_LOADING, fleet_pb2.MODEL_STATE_UNLOADING})


@dataclass(slots=True)
class ModelSlot:
    """A model version on a worker. Blocks are those of its KV cache."""

    record: registry_pb2.ModelRecord
    state: fleet_pb2.ModelState.ValueType = fleet_pb2.MODEL_STATE_UNSPECIFIED
    detail: str = ""
    total_blocks: int = 0
    free_blocks: int = 0
    """As of the worker's last word."""
    held: int = 0
    """Set aside for live attempts, at their longest."""
    promised: int = 0
    """Part of `held` that the worker's last word cannot reflect yet."""
    ordered: bool = False
    """A load order is on its way."""
    used_at: float = 0.0
    """Adapters: when an attempt last began."""
    room: int = -1
    """Blocks that a request may be given now, adapters: that have it loaded; -1: none at all. As of the last
    `State.room_changed`, like what follows."""
    backlog_s: float = 0.0
    """Predicted seconds until a request without a prompt has its first token."""
    token_s: float = 0.0
    """Seconds more for each uncached token."""
    step_s: float = 0.0
    """Predicted seconds between tokens, with one sequence more than now."""
    tail_prefill: float = 1.0
    """What a slow prefill takes, times what was expected of it."""
    tail_gap_s: float = 0.0
    """What a slow gap between tokens takes."""
    times: Times = field(default_factory=Times)
    """What is learned of the worker's speed with this model."""
    device: str = ""
    """Models: the device that it is, or is to be, loaded on."""
    budget: int = 0
    """Models: bytes of that device that are given to it, from the order to load it until they are free again."""
    beside: int = 0
    """Models: bytes of that device that are kept free for its adapters."""
    leaving: bool = False
    """Models: it takes nothing new and is unloaded once it is empty."""
    leave_by: float = 0.0
    """When what still runs on it moves on."""
    unload_sent: bool = False
    """The order to unload is on its way."""
    unfit: bool = False
    """The state is unfit by the scheduler's word, not the worker's: it may come to fit."""
    key: ModelKey = field(init=False)
    """Name and version."""

    def __post_init__(self) -> None:
        self.key = (self.record.model.name, self.record.model.version)

    @property
    def base(self) -> str:
        """Adapters: name of the model that it belongs to, whose blocks it uses. Empty for a model."""
        return self.record.model.base_model

    @property
    def available(self) -> int:
        """Blocks that a new attempt may take: within the totals and within what is free, whichever is less."""
        return min(self.total_blocks - self.held, self.free_blocks - self.promised)

    def fits(self, blocks: int, credit: int) -> bool:
        """Whether `blocks` can be set aside; `credit` of them are freed by the attempt that they replace."""
        if self.leaving:
            return False
        return self.total_blocks - self.held >= blocks and self.free_blocks - self.promised + credit >= blocks

    def report(self, said: fleet_pb2.NodeModel) -> None:
        """Take over the worker's word."""
        if said.state != AVAILABLE:
            self.ordered = False
            self.unfit = False
        elif self.unfit:
            return
        self.state = said.state
        self.detail = said.detail
        self._account(said)
        self.total_blocks = said.total_blocks
        self.free_blocks = said.free_blocks

    @property
    def holds(self) -> bool:
        """A model that has a part of a device."""
        return self.budget > 0

    def _account(self, said: fleet_pb2.NodeModel) -> None:
        """Memory is given out until the worker says that it is free."""
        if said.state in _IN_MEMORY:
            self.device = said.device_id or self.device
            self.budget = said.budget_bytes or self.budget or max(1, said.measured_bytes, self.record.weight_bytes)
        elif not self.ordered:
            self.budget = self.beside = 0
            self.leaving = self.unload_sent = False
        if self.base:
            self.budget = 0
        if self.leaving and said.state == LOADED:
            self.state = fleet_pb2.MODEL_STATE_UNLOADING
        elif said.state == fleet_pb2.MODEL_STATE_UNLOADING and not self.base:
            self.leaving = True


@dataclass(slots=True)
class Load:
    """What a worker has to do for its live attempts, of all models, as far as the core knows."""

    ahead: int = 0
    """Prompt tokens that are not computed yet."""
    prefilling: int = 0
    """Attempts without output."""
    decoding: int = 0
    """Sequences of the others."""


WELL, OUT, TRIAL = "well", "out", "trial"


@dataclass(slots=True)
class Health:
    """Whether a worker is trusted with work; `scheduler/health.py` decides."""

    standing: str = WELL
    """`well`, `out`: nothing new, `trial`: one request at a time."""
    reason: str = ""
    """Why it is out, or on trial."""
    strikes: int = 0
    """Failures in a row that were its own doing."""
    struck_at: float = -math.inf
    pause_s: float = 0.0
    """How long it was out the last time."""
    turn: int = 0
    """Counts the times it was put out."""
    hung: bool = False
    """It is out until its engine steps again."""
    emptying: bool = False
    """What runs there moves on."""
    probe: str = ""
    """The request that it is tried with."""
    failed_trials: int = 0
    """In a row."""
    slow_since: float = 0.0
    slow_at: float = -math.inf
    """When it was first and last told of as slow."""
    unproven: bool = False
    """It was put out as slow, and has never been seen to be faster."""
    slow_by_nature: bool = False

    @property
    def takes(self) -> bool:
        """It may be given work."""
        return self.standing == WELL or (self.standing == TRIAL and not self.probe)


@dataclass(slots=True)
class WorkerView:
    """A worker that is registered, or whose stream lives, or both."""

    record: registry_pb2.WorkerRecord
    registered: bool = True
    connected: bool = False
    draining: bool = False
    """It takes nothing new: by its own word, or because that is wanted."""
    health: Health = field(default_factory=Health)
    suspect: str = ""
    """The suspect that runs there; one at most."""
    drain_wanted: bool | None = None
    """What an operator ordered last: empty it, or take it back. None: nothing."""
    restart: work_pb2.Drain | None = None
    """The order to be started afresh, once it was given."""
    decay: Decay = field(default_factory=Decay)
    """What it uses of what can run out."""
    ended: int = 0
    """Attempts that ended there."""
    drain_look: int = 0
    """Counts the times it began to drain."""
    attachments: int = 0
    """Streams begun so far."""
    fingerprint: str = ""
    slots: dict[str, ModelSlot] = field(default_factory=dict)
    """By model name: a worker has one version of each."""
    running: dict[str, Attempt] = field(default_factory=dict)
    """Live attempts by request id."""
    load: Load = field(default_factory=Load)
    tenants: Counter[str] = field(default_factory=Counter)
    """Live attempts by tenant."""
    unclaimed: dict[str, request_pb2.Epoch] = field(default_factory=dict)
    """What it reported to run and nobody has asked for yet."""
    tokens: int = 0
    """Produced there so far."""
    step: int = 0
    """Its engine's step counter: stands still while the engine hangs."""
    step_at: float = 0.0
    """When the counter last moved, or the engine last had nothing to do."""
    still: bool = False
    """The counter had not moved when the worker last spoke, though there was something to do."""
    output_at: float = 0.0
    """When the last frame with output came."""
    noted_at: float = 0.0
    """When the traces were last told of its progress."""
    busy: bool = False
    busy_at: float = 0.0
    """When it last said that it had something to do."""
    id: str = field(init=False)
    """Unique per process start."""

    def __post_init__(self) -> None:
        self.id = self.record.worker_id

    @property
    def usable(self) -> bool:
        """May be given new work."""
        return self.connected and not self.draining and self.health.takes

    @property
    def loading(self) -> bool:
        """Its engine is busy with a model's weights, or is about to be: it makes no steps then."""
        return any(slot.ordered or slot.state == fleet_pb2.MODEL_STATE_LOADING for slot in self.slots.values())

    def slot_for(self, key: ModelKey) -> ModelSlot | None:
        """Its slot of that model if the version is the same."""
        slot = self.slots.get(key[0])
        return slot if slot is not None and slot.key == key else None

    def loaded(self, key: ModelKey) -> bool:
        """Whether that model or adapter is loaded here."""
        slot = self.slot_for(key)
        return slot is not None and slot.state == LOADED

    def set_aside(self, request_id: str, attempt: Attempt) -> None:
        """Count a dispatch that is about to be sent. What it replaces on the worker pays for it there."""
        slot = self.slots[attempt.model]
        credit = attempt.blocks if self.unclaimed.pop(request_id, None) is not None else 0
        attempt.promised = attempt.blocks - credit
        slot.held += attempt.blocks
        slot.promised += attempt.promised
        self.running[request_id] = attempt
        self.tenants[attempt.tenant] += 1
        self.load.ahead += attempt.uncached
        self.load.prefilling += 1

    def started(self, attempt: Attempt) -> None:
        """An attempt has shown its first output: its prompt is computed."""
        attempt.started = True
        self.load.ahead -= attempt.uncached
        self.load.prefilling -= 1
        self.load.decoding += attempt.sequences

    def reflected(self, attempt: Attempt) -> None:
        """The worker has shown that it runs this attempt: its free blocks now include it."""
        if attempt.promised:
            self.slots[attempt.model].promised -= attempt.promised
            attempt.promised = 0

    def release(self, request_id: str) -> None:
        """An attempt is over: give its blocks back."""
        attempt = self.running.pop(request_id)
        self.ended += 1
        if not attempt.started:
            self.started(attempt)
        self.load.decoding -= attempt.sequences
        self.tenants[attempt.tenant] -= 1
        if not self.tenants[attempt.tenant]:
            del self.tenants[attempt.tenant]
        slot = self.slots[attempt.model]
        self.reflected(attempt)
        slot.held -= attempt.blocks
