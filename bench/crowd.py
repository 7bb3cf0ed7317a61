"""A scheduler's core in the middle of its life: a fleet with full prefix caches, many tenants, a long queue. No I/O."""

from __future__ import annotations

import heapq
import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmos.internal.v1 import registry_pb2, request_pb2, requests_pb2, work_pb2
from llmos.v1 import fleet_pb2, inference_pb2
from scheduler import events
from scheduler.commands import Command, StartAttempt
from scheduler.core import Core
from scheduler.policy import Policy

GIB = 2**30
ROOMY, FULL = "roomy", "full"
"""Models on every worker: one has room, for the other one the queue is long."""
PROMPT_TOKENS = 1000
PROMPT_BLOCKS = PROMPT_TOKENS // 64
SYSTEM_BLOCKS = 7
"""Blocks at the beginning that all prompts of a tenant share."""
_CLASSES = (
    request_pb2.PRIORITY_CLASS_INTERACTIVE,
    request_pb2.PRIORITY_CLASS_STANDARD,
    request_pb2.PRIORITY_CLASS_BATCH,
)
_PATIENT = Policy(queue_limit=1_000_000, queue_token_limit=1 << 40, ttft_bounds_s=(1e9, 1e9, 1e9))
"""Refuses nobody: what is measured is a decision to serve."""
RUNNING = 8
"""Requests that run on each worker."""


@dataclass(frozen=True, slots=True)
class Size:
    """How large a fleet, and what it remembers."""

    workers: int
    waiting: int = 10_000
    tenants: int = 200
    cached_blocks: int = 1_000_000
    gateways: int = 4


class Crowd:
    """One core, ready to be measured. Times are its own; what is handed to it is made before the clock starts."""

    def __init__(self, size: Size, seed: int = 1) -> None:
        self.size = size
        self.rng = random.Random(seed)
        self.now = 1000.0
        self.core = Core("s1", 7, _PATIENT, self.now)
        self.running: deque[StartAttempt] = deque()
        """Requests that have shown their first token, oldest first."""
        self._prefills: list[tuple[float, int, StartAttempt]] = []
        self._pause_s = 0.1 / size.workers
        self._requests = 0
        self._prompts = [self.rng.choices(range(50_000), k=PROMPT_TOKENS) for _ in range(256)]
        self._steps = dict.fromkeys(self.workers, 1)
        self._chains = _Chains(self.rng, size)
        self._attach()
        self._remember()
        self._fill_queue()
        for _ in range(RUNNING * size.workers):
            self.note(self.handle(self.arrival()))
        while self._prefills:
            self.let_time_pass()

    @property
    def workers(self) -> Sequence[str]:
        """Ids."""
        return [f"worker-{number}" for number in range(self.size.workers)]

    def handle(self, event: events.Event) -> list[Command]:
        """What the core wants done about it."""
        return self.core.handle(event, self.now)

    def timed(self, event: events.Event) -> tuple[float, list[Command]]:
        """The same with the seconds of processor time that it took, pauses of the garbage collector included."""
        begin = time.thread_time()
        issued = self.core.handle(event, self.now)
        return time.thread_time() - begin, issued

    def let_time_pass(self) -> None:
        """A while in which each worker gets a hundredth of its requests; first tokens come when they are due."""
        self.now += self._pause_s
        while self._prefills and self._prefills[0][0] <= self.now:
            start = heapq.heappop(self._prefills)[2]
            self.handle(self.frame(start.worker_id, [_output(start, index=0)]))
            self.running.append(start)

    def arrival(self, model: str = ROOMY) -> events.Submitted:
        """A request with 1,000 prompt tokens, part of which somebody has cached."""
        self._requests += 1
        tenant, hashes = self._chains.prompt()
        request = request_pb2.Request(
            request_id=f"req-{self._requests:020}",
            tenant=f"tenant-{tenant}",
            model=model,
            token_ids=self._prompts[self._requests % len(self._prompts)],
            prefix_hashes=hashes,
            sampling=request_pb2.Sampling(temperature=1.0, top_p=1.0, seed=self._requests),
            max_tokens=280,
            choices=1,
            # Who waits has one class, so that nobody is preempted for another.
            priority=self.rng.choice(_CLASSES) if model == ROOMY else request_pb2.PRIORITY_CLASS_STANDARD,
            deadline_ms=3_600_000,
        )
        return events.Submitted(1 + self._requests % self.size.gateways, request)

    def note(self, issued: Sequence[Command]) -> None:
        """Remember what has begun. Fails if nothing has."""
        [start] = [command for command in issued if isinstance(command, StartAttempt)]
        load = self.core.state.workers[start.worker_id].load
        seconds = (0.01 + 5e-5 * load.ahead + 1e-3 * load.decoding) * self.rng.lognormvariate(0, 0.2)
        self._requests += 1
        heapq.heappush(self._prefills, (self.now + seconds, self._requests, start))

    def end(self) -> events.WorkerFrame:
        """The oldest request ends."""
        start = self.running.popleft()
        last = _output(start, index=self.core.state.requests[start.request.request_id].tokens_out)
        last.finish_reason = inference_pb2.FINISH_REASON_STOP
        return self.frame(start.worker_id, [last])

    def steps(self, outputs: int) -> Iterator[events.WorkerFrame]:
        """A token for so many requests at once, of workers that run as many."""
        state = self.core.state
        by_worker: dict[str, list[StartAttempt]] = {}
        for start in self.running:
            if state.requests[start.request.request_id].tokens_left > outputs:  # none ends by this
                by_worker.setdefault(start.worker_id, []).append(start)
        for worker, starts in by_worker.items():
            pieces = [
                _output(start, index=state.requests[start.request.request_id].tokens_out) for start in starts * outputs
            ][:outputs]
            for place, piece in enumerate(pieces):
                piece.index += place // len(starts)
            yield self.frame(worker, pieces)

    def frame(self, worker: str, outputs: Sequence[request_pb2.Output]) -> events.WorkerFrame:
        """As its worker would send it, after one step more."""
        self._steps[worker] += 1
        frame = work_pb2.WorkFrame(step=self._steps[worker], busy=True, outputs=outputs)
        return events.WorkerFrame(worker, frame)

    def _attach(self) -> None:
        for stream in range(1, self.size.gateways + 1):
            node = fleet_pb2.Node(id=f"gateway-{stream}", role=fleet_pb2.NODE_ROLE_GATEWAY)
            self.handle(events.GatewayConnected(stream, node))
        for worker in self.workers:
            self.handle(events.WorkerRegistered(_record(worker)))
        self.handle(events.MembersListed())
        for worker in self.workers:
            models = [_loaded(ROOMY, 4096), _loaded(FULL, 32)]
            report = work_pb2.WorkerReport(worker_id=worker, models=models, numerics_fingerprint="n")
            self.handle(events.WorkerAttached(worker, report))

    def _remember(self) -> None:
        for worker in self.workers:
            hashes = self._chains.cache(self.size.cached_blocks // self.size.workers)
            change = work_pb2.CacheChange(model=ROOMY, number=1, stored=hashes)
            self.handle(events.WorkerFrame(worker, work_pb2.WorkFrame(step=1, cache=[change])))

    def _fill_queue(self) -> None:
        """Every worker runs one request of the other model, which takes all its room; further ones wait."""
        for _ in range(self.size.workers + self.size.waiting):
            self.handle(self.arrival(FULL))
        assert len(self.core.state.waiting) == self.size.waiting


class _Chains:
    """Prompts as chains of hashes: each begins with its tenant's system prompt and goes on with a conversation."""

    def __init__(self, rng: random.Random, size: Size) -> None:
        self._rng = rng
        self._tenants = size.tenants
        self._conversations = size.cached_blocks // (PROMPT_BLOCKS - SYSTEM_BLOCKS)

    def prompt(self) -> tuple[int, list[int]]:
        """A tenant and the hashes of one of its conversations."""
        conversation = self._rng.randrange(self._conversations)
        return conversation % self._tenants, self._hashes(conversation)

    def cache(self, blocks: int) -> list[int]:
        """What a worker holds: conversations, the last of them in part."""
        held: dict[int, None] = {}
        while len(held) < blocks:
            hashes = self._hashes(self._rng.randrange(self._conversations))
            new = [one for one in hashes if one not in held]
            held.update(dict.fromkeys(new[: blocks - len(held)]))
        return list(held)

    def _hashes(self, conversation: int) -> list[int]:
        tenant = conversation % self._tenants
        own = [(1 << 62) + conversation * PROMPT_BLOCKS + place for place in range(SYSTEM_BLOCKS, PROMPT_BLOCKS)]
        return [(1 << 61) + tenant * PROMPT_BLOCKS + place for place in range(SYSTEM_BLOCKS)] + own


def _output(start: StartAttempt, index: int) -> request_pb2.Output:
    return request_pb2.Output(request_id=start.request.request_id, epoch=start.epoch, index=index, token_ids=[17])


def _loaded(model: str, blocks: int) -> fleet_pb2.NodeModel:
    return fleet_pb2.NodeModel(
        name=model,
        version="v1",
        state=fleet_pb2.MODEL_STATE_LOADED,
        total_blocks=blocks,
        free_blocks=blocks,
    )


def _record(worker: str) -> registry_pb2.WorkerRecord:
    device = fleet_pb2.Device(id="cpu", kind=fleet_pb2.DEVICE_KIND_CPU, memory_bytes=64 * GIB)
    models = [
        registry_pb2.ModelRecord(
            model=requests_pb2.CatalogueModel(name=name, version="v1", context_length=8192), weight_bytes=GIB
        )
        for name in (ROOMY, FULL)
    ]
    return registry_pb2.WorkerRecord(
        worker_id=worker,
        address=f"{worker}:1",
        backend="echo",
        capacity=fleet_pb2.Capacity(devices=[device]),
        models=models,
    )
