"""The core among workers whose memory is watched: loads take time, orders and words travel, everything is virtual.

A worker refuses to hold more than its devices have, whatever it is told: that is what the tests are about.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from llmos.internal.v1 import registry_pb2, request_pb2, requests_pb2, work_pb2
from llmos.v1 import fleet_pb2, inference_pb2
from scheduler import commands, events
from scheduler.core import Core
from scheduler.policy import Policy

GIB = 2**30
VERSION = "v1"
AVAILABLE, LOADING = fleet_pb2.MODEL_STATE_AVAILABLE, fleet_pb2.MODEL_STATE_LOADING
FAILED = fleet_pb2.MODEL_STATE_FAILED
LOADED, UNLOADING = fleet_pb2.MODEL_STATE_LOADED, fleet_pb2.MODEL_STATE_UNLOADING
BLOCK_BYTES = 64 << 20


def replicas(
    name: str,
    model: str,
    least: int = 0,
    most: int = 0,
    *,
    pinned: tuple[str, ...] = (),
    kind: fleet_pb2.ResourceClass.ValueType = fleet_pb2.RESOURCE_CLASS_BURSTABLE,
    pool: str = "",
    revision: int = 1,
    target: int = 0,
    reserved: tuple[fleet_pb2.ReservedShare, ...] = (),
) -> fleet_pb2.Allocation:
    """A promise of replicas."""
    spec = fleet_pb2.ModelReplicas(
        model=model,
        min_replicas=least,
        max_replicas=most,
        pinned_workers=pinned,
        target_requests=target,
        reserved=reserved,
    )
    return fleet_pb2.Allocation(name=name, model=spec, resource_class=kind, pool=pool, revision=revision)


def job(
    name: str,
    memory: int,
    *,
    kind: fleet_pb2.ResourceClass.ValueType = fleet_pb2.RESOURCE_CLASS_BEST_EFFORT,
    cpu: float = 0.0,
    revision: int = 1,
) -> fleet_pb2.Allocation:
    """A promise to a job."""
    spec = fleet_pb2.JobResources(memory_bytes=memory, cpu_cores=cpu)
    return fleet_pb2.Allocation(name=name, job=spec, resource_class=kind, revision=revision)


@dataclass
class Machine:
    """A worker process with one device."""

    record: registry_pb2.WorkerRecord
    load_s: float
    states: dict[str, fleet_pb2.NodeModel] = field(default_factory=dict)
    ready_at: dict[str, float] = field(default_factory=dict)
    free_at: dict[str, float] = field(default_factory=dict)
    inbox: deque[work_pb2.Command | work_pb2.Dispatch] = field(default_factory=deque)
    running: dict[str, tuple[request_pb2.Request, request_pb2.Epoch, list[int]]] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    failures: list[request_pb2.Failure] = field(default_factory=list)
    connected: bool = True
    draining: bool = False
    steps: int = 0
    unloads: list[str] = field(default_factory=list)

    @property
    def id(self) -> str:
        return self.record.worker_id

    def check(self) -> None:
        """What is given out never exceeds the device."""
        held = sum(said.budget_bytes for said in self.states.values())
        assert held <= self.record.capacity.devices[0].memory_bytes, f"{self.id} holds {held / GIB:.2f} GiB"

    def say(self, name: str, state: fleet_pb2.ModelState.ValueType, **more: int) -> None:
        said = fleet_pb2.NodeModel(name=name, version=VERSION, state=state)
        if state not in (AVAILABLE, FAILED):
            before = self.states.get(name)
            said.budget_bytes = more.pop("budget_bytes", 0 if before is None else before.budget_bytes)
            said.device_id = "cpu"
        more.pop("budget_bytes", None)
        for key, value in more.items():
            setattr(said, key, value)
        self.states[name] = said
        self.changed.add(name)

    def obey(self, order: work_pb2.Command | work_pb2.Dispatch, now: float) -> None:
        if isinstance(order, work_pb2.Dispatch):
            self._run(order)
        elif order.WhichOneof("order") == "load":
            if self.states[order.load.model].state == AVAILABLE:
                self.say(order.load.model, LOADING, budget_bytes=order.load.memory_budget_bytes)
                self.ready_at[order.load.model] = now + self.load_s
        elif order.WhichOneof("order") == "unload":
            name = order.unload.model
            self.unloads.append(name)
            if self.states[name].state in (LOADED, LOADING):
                assert not any(request.model == name for request, _, _ in self.running.values()), "drain first"
                self.ready_at.pop(name, None)
                self.say(name, UNLOADING)
                self.free_at[name] = now + 0.1
        elif order.WhichOneof("order") == "cancel":
            self.running.pop(order.cancel.request_id, None)
        self.check()

    def _run(self, order: work_pb2.Dispatch) -> None:
        request = order.request
        if self.states[request.model].state != LOADED:  # an engine that was lost meanwhile
            lost = request_pb2.Failure(request_id=request.request_id, epoch=order.epoch, code="attempt_lost")
            self.failures.append(lost)
            return
        done = sum(len(resume.token_ids) for resume in request.resume)
        self.running[request.request_id] = (request, order.epoch, [done])

    def frame(self, now: float) -> work_pb2.WorkFrame:
        """A step of work: each request gets two tokens."""
        self.steps += 1
        frame = work_pb2.WorkFrame(step=self.steps, busy=bool(self.running), draining=self.draining)
        for name in [name for name, at in self.ready_at.items() if at <= now]:
            del self.ready_at[name]
            budget = self.states[name].budget_bytes
            weights = next(model.weight_bytes for model in self.record.models if model.model.name == name)
            blocks = (budget - weights) // BLOCK_BYTES
            self.say(
                name,
                LOADED,
                total_blocks=blocks,
                free_blocks=blocks,
                measured_fixed_bytes=weights,
                measured_bytes=weights + blocks * BLOCK_BYTES,
                load_ms=max(1, int(1000 * self.load_s)),
            )
        for name in [name for name, at in self.free_at.items() if at <= now]:
            del self.free_at[name]
            self.say(name, AVAILABLE)
        for request_id, (request, epoch, done) in list(self.running.items()):
            count = min(2, request.max_tokens - done[0])
            output = request_pb2.Output(
                request_id=request_id, epoch=epoch, index=done[0], token_ids=range(done[0], done[0] + count)
            )
            done[0] += count
            if done[0] >= request.max_tokens:
                output.finish_reason = inference_pb2.FINISH_REASON_LENGTH
                del self.running[request_id]
            frame.outputs.append(output)
        self.changed.update(name for name, said in self.states.items() if said.state == LOADED)
        frame.failures.extend(self.failures)
        self.failures.clear()
        frame.models.extend(self.states[name] for name in sorted(self.changed))
        self.changed.clear()
        return frame

    def report(self) -> work_pb2.WorkerReport:
        running = [work_pb2.RunningAttempt(request_id=key, epoch=value[1]) for key, value in self.running.items()]
        return work_pb2.WorkerReport(worker_id=self.id, running=running, models=list(self.states.values()))


class LedgerArena:
    """One leader, machines, one gateway that only submits."""

    def __init__(self, policy: Policy | None = None, *, load_s: float = 2.0) -> None:
        self.now = 1000.0
        self.policy = policy or Policy(replica_down_s=10.0, replica_idle_s=5.0)
        self.load_s = load_s
        self.machines: dict[str, Machine] = {}
        self.written: dict[str, registry_pb2.AssignmentRecord] = {}
        self.promises: dict[str, fleet_pb2.Allocation] = {}
        self.failed: dict[str, str] = {}
        self.ended: set[str] = set()
        self.term = 7
        self.requests = 0
        self._elect()

    def _elect(self) -> None:
        self.core = Core("s1", self.term, replace(self.policy, await_promises=True), self.now)
        if self.term == 7:
            self.post(events.PromisesListed(()))
        self.post(events.GatewayConnected(1, fleet_pb2.Node(id="g1")))

    # -- the world

    def post(self, event: events.Event) -> None:
        for command in self.core.handle(event, self.now):
            self._carry(command)
        self.check()

    def _carry(self, command: commands.Command) -> None:
        match command:
            case commands.StartAttempt():
                self._send(command.worker_id, command.dispatch)
            case commands.Order():
                self._send(command.worker_id, command.command)
            case commands.WriteAssignment():
                if command.record.assignments:
                    self.written[command.record.worker_id] = command.record
                else:
                    self.written.pop(command.record.worker_id, None)
            case commands.SendFailure():
                self.failed[command.failure.request_id] = command.failure.code
            case commands.RequestOver():
                self.ended.add(command.request_id)

    def _send(self, worker_id: str, order: work_pb2.Command | work_pb2.Dispatch) -> None:
        machine = self.machines.get(worker_id)
        if machine is not None and machine.connected:
            machine.inbox.append(order)

    def add(
        self,
        worker_id: str,
        models: dict[str, int],
        *,
        memory: int = 16 * GIB,
        pool: str = "",
        cores: float = 4.0,
    ) -> Machine:
        """A worker with models by name and GiB of weights."""
        record = registry_pb2.WorkerRecord(
            worker_id=worker_id,
            address=f"{worker_id}:1",
            host=f"host-{worker_id}",
            pool=pool,
            capacity=fleet_pb2.Capacity(
                devices=[fleet_pb2.Device(id="cpu", kind=fleet_pb2.DEVICE_KIND_CPU, memory_bytes=memory)],
                cpu_cores=cores,
                memory_bytes=memory,
                disk_bytes=100 * GIB,
            ),
            models=[
                registry_pb2.ModelRecord(
                    model=requests_pb2.CatalogueModel(name=name, version=VERSION, context_length=4096),
                    weight_bytes=size * GIB,
                    kv_bytes_per_token=BLOCK_BYTES // 64,
                )
                for name, size in models.items()
            ],
        )
        machine = self.machines[worker_id] = Machine(record, self.load_s)
        for name in models:
            machine.say(name, AVAILABLE)
        self.post(events.WorkerRegistered(record))
        self.post(events.WorkerAttached(worker_id, machine.report()))
        return machine

    def lose(self, worker_id: str, *, for_good: bool = True) -> None:
        machine = self.machines[worker_id]
        machine.connected = False
        machine.inbox.clear()
        self.post(events.WorkerDetached(worker_id, "test"))
        if for_good:
            del self.machines[worker_id]
            self.post(events.WorkerDeregistered(worker_id))

    def back(self, worker_id: str) -> None:
        self.machines[worker_id].connected = True
        self.post(events.WorkerAttached(worker_id, self.machines[worker_id].report()))

    def fail_over(self) -> None:
        """A new leader, which knows what etcd holds and what workers say."""
        self.term += 1
        for machine in self.machines.values():
            machine.inbox.clear()
        self._elect()
        self.post(events.PromisesListed(tuple(self.promises.values()), tuple(self.written.values())))
        for machine in self.machines.values():
            self.post(events.WorkerRegistered(machine.record))
        self.post(events.MembersListed())
        for machine in self.machines.values():
            if machine.connected:
                self.post(events.WorkerAttached(machine.id, machine.report()))

    def promise(self, allocation: fleet_pb2.Allocation) -> None:
        self.promises[allocation.name] = allocation
        self.post(events.PromiseChanged(allocation.name, allocation))

    def take_back(self, name: str) -> None:
        self.promises.pop(name, None)
        self.post(events.PromiseChanged(name, None))

    def ask(self, model: str, tokens: int = 8, count: int = 1) -> list[str]:
        asked = []
        for _ in range(count):
            self.requests += 1
            request = request_pb2.Request(
                request_id=f"r{self.requests}", tenant="t", model=model, max_tokens=tokens, choices=1, token_ids=[1] * 8
            )
            asked.append(request.request_id)
            self.post(events.Submitted(1, request))
        return asked

    def deliver(self) -> None:
        """Orders arrive, machines work for a step, what they say arrives."""
        for machine in list(self.machines.values()):
            if not machine.connected:
                continue
            while machine.inbox:
                machine.obey(machine.inbox.popleft(), self.now)
            self.post(events.WorkerFrame(machine.id, machine.frame(self.now)))

    def run(self, seconds: float, step_s: float = 0.5) -> None:
        """Let time pass."""
        end = self.now + seconds
        while self.now < end:
            self.now += step_s
            self.deliver()
            self.post(events.Tick())

    # -- what is seen

    def loaded(self, model: str) -> list[str]:
        """Workers that really have it loaded."""
        there = (m for m in self.machines.values() if model in m.states and m.states[model].state == LOADED)
        return sorted(machine.id for machine in there)

    def jobs(self) -> dict[str, str]:
        return {job.name: job.worker_id for job in self.core.state.book.jobs.values()}

    def check(self) -> None:
        """By the ledger's own accounts and by the machines', jobs included, nothing exceeds its device."""
        book = self.core.state.book
        for worker in self.core.state.workers.values():
            memory = worker.record.capacity.devices[0].memory_bytes
            given = sum(slot.budget + slot.beside for slot in worker.slots.values())
            jobs = sum(job.memory_bytes for job in book.jobs.values() if job.worker_id == worker.id)
            assert given + jobs <= memory, f"{worker.id}: {given / GIB:.2f} + {jobs / GIB:.2f} GiB"
            cores = sum(job.cpu_cores for job in book.jobs.values() if job.worker_id == worker.id)
            assert cores <= worker.record.capacity.cpu_cores
            machine = self.machines.get(worker.id)
            if machine is not None:
                really = sum(said.budget_bytes for said in machine.states.values())
                assert really + jobs <= memory, f"{worker.id} really: {really / GIB:.2f} + {jobs / GIB:.2f}"
