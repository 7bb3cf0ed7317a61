"""What the ledger remembers: promises, jobs, how many replicas are wanted, what models were measured to take."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from llmos.internal.v1 import registry_pb2
from llmos.v1 import fleet_pb2
from scheduler.allocation.replicas import Replicas
from scheduler.requests import ModelKey

GUARANTEED = fleet_pb2.RESOURCE_CLASS_GUARANTEED
BEST_EFFORT = fleet_pb2.RESOURCE_CLASS_BEST_EFFORT

PLEDGED, SET_ASIDE, EXTRA, IDLE, SPARE = range(5)
"""Ranks of a claim. PLEDGED: guaranteed; SET_ASIDE: the minimum of what is burstable; EXTRA: replicas beyond the
minimum, and what is loaded because there is room; IDLE: such a replica that nobody uses; SPARE: best effort."""


@dataclass(frozen=True, slots=True)
class JobHolding:
    """A job on a worker: accounting, nothing else."""

    name: str
    worker_id: str
    device_id: str
    memory_bytes: int
    cpu_cores: float
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class Reservation:
    """Room that is coming, and for whom it is kept."""

    worker_id: str
    device_id: str
    rank: int
    bytes: int


@dataclass(slots=True)
class Book:
    """Owned by the core's state; written by this package and by the workers' reports."""

    promises: dict[str, fleet_pb2.Allocation] = field(default_factory=dict)
    """By name."""
    revisions: dict[str, int] = field(default_factory=dict)
    """By name: etcd's revision of the last change that is known, deletions included."""
    listed: bool = False
    """All promises and assignments that were there at the election are known."""
    jobs: dict[str, JobHolding] = field(default_factory=dict)
    """By name of the allocation: where each job is, if it is anywhere."""
    restored: dict[str, JobHolding] = field(default_factory=dict)
    """Where an earlier leader had written that jobs are, until that worker says what it holds."""
    replicas: dict[str, Replicas] = field(default_factory=dict)
    """By name of the allocation: how many replicas are wanted now."""
    reserved: dict[str, Reservation] = field(default_factory=dict)
    """By claim: the room that it waits for while others leave."""
    fixed: dict[tuple[ModelKey, int], int] = field(default_factory=dict)
    """Bytes of weights and workspace as measured, by version and declared weights: these differ with the precision."""
    load_s: dict[ModelKey, float] = field(default_factory=dict)
    """Seconds that loading took last."""
    arrivals: Counter[str] = field(default_factory=Counter)
    """Requests that began to wait, by model."""
    departures: Counter[str] = field(default_factory=Counter)
    """Requests that ended, by model."""
    asleep: set[str] = field(default_factory=set)
    """Models that are offered and wanted nowhere: the next request wakes them."""
    touched: set[str] = field(default_factory=set)
    """Workers whose holdings may have changed since their assignment was written."""
    written: dict[str, registry_pb2.AssignmentRecord] = field(default_factory=dict)
    """Assignments as last written, by worker."""
    leaving: set[tuple[str, str]] = field(default_factory=set)
    """Worker and model of what is being emptied."""
    _by_model: dict[tuple[str, str], str] = field(default_factory=dict)
    """Model and pool to the name of the promise that counts its replicas there."""
    reserving: set[str] = field(default_factory=set)
    """Names of promises that keep KV blocks for somebody."""
    due: bool = False
    """Something has changed that may move replicas or jobs."""

    def of(self, model: str, pool: str) -> fleet_pb2.Allocation | None:
        """The promise that says how many replicas of a model a pool has; None: whoever has room loads it."""
        name = self._by_model.get((model, pool))
        return None if name is None else self.promises[name]

    def promise(self, name: str, allocation: fleet_pb2.Allocation | None) -> None:
        """Make, change, or take back (None) a promise."""
        before = self.promises.pop(name, None)
        self.reserving.discard(name)
        if before is not None and before.WhichOneof("holder") == "model":
            self._by_model.pop((before.model.model, before.pool), None)
        if allocation is None:
            self.replicas.pop(name, None)
            return
        self.promises[name] = allocation
        if allocation.WhichOneof("holder") == "model":
            self._by_model[allocation.model.model, allocation.pool] = name
            if allocation.model.reserved:
                self.reserving.add(name)

    def arrived(self, model: str) -> None:
        """A request for it begins to wait."""
        self.arrivals[model] += 1
        if model in self.asleep:
            self.due = True

    def learn(self, record: registry_pb2.ModelRecord, said: fleet_pb2.NodeModel) -> None:
        """Correct what is known of a version by what a worker measured."""
        key = (record.model.name, record.model.version)
        if said.measured_fixed_bytes:
            self.fixed[key, record.weight_bytes] = said.measured_fixed_bytes
        if said.load_ms:
            self.load_s[key] = said.load_ms / 1000

    def fixed_of(self, record: registry_pb2.ModelRecord) -> int:
        """Weights and workspace in bytes: measured if they ever were, else as declared."""
        key = (record.model.name, record.model.version)
        measured = self.fixed.get((key, record.weight_bytes))
        return record.weight_bytes + record.workspace_bytes if measured is None else measured


def minimum(promise: fleet_pb2.Allocation) -> int:
    """Replicas that are set aside, wherever they stand."""
    return max(promise.model.min_replicas, len(promise.model.pinned_workers))


def is_pinned(promise: fleet_pb2.Allocation, record: registry_pb2.WorkerRecord) -> bool:
    """Whether the worker is one of those that must have the model."""
    return record.worker_id in promise.model.pinned_workers or record.host in promise.model.pinned_workers


def claim_rank(promise: fleet_pb2.Allocation) -> int:
    """Rank of what is promised at least: a minimum replica, or a job."""
    if promise.resource_class == GUARANTEED:
        return PLEDGED
    return SPARE if promise.resource_class == BEST_EFFORT else SET_ASIDE
