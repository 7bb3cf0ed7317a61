"""A model of the worker's engine: the same admission, batches, blocks and prefix cache, with seconds from `StepCost`.

What it shares with the real one is the block manager itself; the rest follows `worker/engine/roster.py`, `batch.py`
and `run.py`, for requests of one choice without drafts. Decoding sequences all get a token in each step, so that a
step costs the same however many there are: what happens to one of them is looked up by the count of decode steps.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

from bench.simulated.cost import StepCost
from bench.simulated.job import BLOCK_TOKENS, Job, blocks_of
from worker.engine.blocks import BlockManager

PREFILL_TOKENS = 128
"""Most prompt tokens of a step."""


@dataclass(slots=True)
class Step:
    """What a step computed, once it is over."""

    first: list[Job] = field(default_factory=list)
    """Had their first token."""
    finished: list[Job] = field(default_factory=list)
    """Had their last token, maybe their first as well."""
    decoded: list[Job] = field(default_factory=list)
    """Had another token. In no order, and only if the engine was told to name them."""
    prefill: int = 0
    """Prompt tokens computed."""
    decodes: int = 0
    """Sequences that had another token."""
    stored: list[int] = field(default_factory=list)
    """Hashes that the prefix cache took in."""
    removed: list[int] = field(default_factory=list)
    """Hashes that it dropped."""


@dataclass(slots=True)
class _Chunk:
    job: Job
    end: int


class Engine:
    """One worker. Call `begin` and, as many seconds later as it says, `end`; `admit` and `cancel` at any time."""

    def __init__(
        self, blocks: int, cost: StepCost, *, speed: float = 1.0, max_running: int = 64, naming: bool = False
    ) -> None:
        self.manager = BlockManager(blocks)
        self.preemptions = 0
        self.busy_s = 0.0
        self._cost = cost
        self._speed = speed
        self._max_running = max_running
        self._naming = naming
        self._waiting: list[Job] = []
        self._prefilling: list[Job] = []
        self._decoding: dict[str, Job] = {}
        self._steps = 0
        """Decode steps so far."""
        self._context = 0
        """Known tokens of all decoding sequences."""
        self._growing: list[dict[str, Job]] = [{} for _ in range(BLOCK_TOKENS)]
        """Decoding sequences by the remainder of the decode steps at which they need another block."""
        self._ends: list[tuple[int, str, Job]] = []
        """Decoding sequences by the count of decode steps at which they end; some are gone."""
        self._chunks: list[_Chunk] = []
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._waiting) + len(self._prefilling) + len(self._decoding)

    @property
    def waiting(self) -> int:
        """Requests that do not run yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that run."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def used(self) -> int:
        """Blocks that requests hold."""
        return self.manager.total - self.manager.free

    def admit(self, job: Job, priority: int = 0) -> None:
        """Queue a request. It must fit into the blocks when alone."""
        self._arrivals += 1
        job.order = (priority, self._arrivals)
        bisect.insort(self._waiting, job, key=_order)

    def cancel(self, request_id: str) -> None:
        """Forget a request before the next step; an unknown one is ignored."""
        if (job := self._decoding.get(request_id)) is not None:
            self._leave(job)
            self.manager.release(job.blocks)
            return
        for jobs in (self._waiting, self._prefilling):
            for job in jobs:
                if job.id == request_id:
                    jobs.remove(job)
                    self.manager.release(job.blocks)
                    self._chunks = [chunk for chunk in self._chunks if chunk.job is not job]
                    return

    def begin(self) -> float | None:
        """Plan a step; the seconds that it takes, or None if there is nothing to do."""
        if self._waiting:
            self._start()
        if not self._prefilling and not self._decoding:
            return None
        self._plan()
        self._make_room()
        prefill = sum(chunk.end - chunk.job.computed for chunk in self._chunks)
        attended = sum(_triangle(chunk.end) - _triangle(chunk.job.computed) for chunk in self._chunks)
        seconds = self._cost.seconds(len(self._decoding), self._context, prefill, attended) / self._speed
        self.busy_s += seconds
        return seconds

    def end(self) -> Step:
        """The step is over."""
        step = Step()
        self._decode(step)
        for chunk in self._chunks:
            self._computed(chunk, step)
        self._chunks = []
        for job in step.finished:
            self.manager.release(job.blocks)
        step.stored, step.removed = self.manager.take_changes()
        return step

    def _start(self) -> None:
        """Let those that wait run, in order; the first that does not fit holds up the others."""
        while self._waiting and self._admits(self._waiting[0]):
            job = self._waiting.pop(0)
            job.running = True
            bisect.insort(self._prefilling, job, key=_order)

    def _admits(self, job: Job) -> bool:
        """Whether there is room, perhaps in the place of some of a lower class, which are then preempted."""
        lower = [other for other in self._running() if other.order[0] > job.order[0]]
        lower.sort(key=_order)
        for count in range(len(lower) + 1):
            victims = lower[len(lower) - count :]
            if self._fits(job, victims):
                for victim in reversed(victims):
                    self._preempt(victim)
                return True
        return False

    def _fits(self, job: Job, without: list[Job]) -> bool:
        """Whether there is room beside the others, each of which is going to fill another block."""
        gone = {victim.id for victim in without}
        others = [other for other in self._running() if other.id not in gone]
        if not others:
            return True
        promised = sum(self._blocks_soon(other) - len(other.blocks) for other in others)
        needed = self._blocks_soon(job) - self.manager.held(job.hashes[: job.usable])
        free = self.manager.free + sum(len(victim.blocks) for victim in without)
        return len(others) < self._max_running and needed + promised <= free

    def _blocks_soon(self, job: Job) -> int:
        produced = job.produced
        if job.id in self._decoding:
            produced += self._steps - job.began
        return blocks_of(job.prompt + min(produced + BLOCK_TOKENS, job.max_tokens))

    def _plan(self) -> None:
        """Chunks of prompts, in order, that end at multiples of a block, of so many tokens together."""
        budget, begun = PREFILL_TOKENS, set[int]()
        several = len(self._prefilling) > 1
        for job in self._prefilling:
            self._adopt(job)
            if budget and not _awaits(job, begun):
                end = _chunk_end(job, budget)
                if end > job.computed:
                    self._chunks.append(_Chunk(job, end))
                budget = budget - (end - job.computed) if end == job.target else 0
            if several and job.computed < job.prompt:
                begun.update(job.hashes)
            if not several and not budget:
                break

    def _adopt(self, job: Job) -> None:
        """Take the prompt's next blocks from the prefix cache while they are there."""
        if job.computed % BLOCK_TOKENS:
            return
        while (number := job.computed // BLOCK_TOKENS) < job.usable:
            block = self.manager.find(job.hashes[number])
            if block is None:
                return
            self.manager.hold(block)
            job.blocks.append(block)
            job.computed += BLOCK_TOKENS
            job.cached += BLOCK_TOKENS

    def _make_room(self) -> None:
        """Reserve what the step writes, first come first; who runs out takes from who came last."""
        growing = self._growing[self._steps % BLOCK_TOKENS]
        needing = [(job, len(job.blocks) + 1) for job in growing.values()]
        needing += [(chunk.job, blocks_of(chunk.end)) for chunk in self._chunks]
        if len(needing) > 1:
            needing.sort(key=lambda need: need[0].order)
        for job, blocks in needing:
            while job.running and self.manager.free < blocks - len(job.blocks):
                self._preempt(max(self._running(), key=_order))
            while job.running and len(job.blocks) < blocks:
                job.blocks.append(self.manager.allocate())

    def _preempt(self, job: Job) -> None:
        """Take its blocks; it waits again, with what it has produced."""
        if job.id in self._decoding:
            self._leave(job)
        else:
            self._prefilling.remove(job)
            self._chunks = [chunk for chunk in self._chunks if chunk.job is not job]
        self.manager.release(job.blocks)
        job.blocks, job.computed, job.running = [], 0, False
        bisect.insort(self._waiting, job, key=_order)
        self.preemptions += 1

    def _decode(self, step: Step) -> None:
        """Everybody who decodes gets a token."""
        step.decodes = len(self._decoding)
        if not self._decoding:
            return
        self._steps += 1
        self._context += len(self._decoding)
        if self._naming:
            step.decoded = list(self._decoding.values())
        while self._ends and self._ends[0][0] <= self._steps:
            _, _, job = heapq.heappop(self._ends)
            if self._decoding.get(job.id) is job and job.began + job.answer - job.produced <= self._steps:
                self._leave(job)
                step.finished.append(job)

    def _computed(self, chunk: _Chunk, step: Step) -> None:
        """A chunk's keys and values are there: cache full blocks; at the prompt's end comes a token."""
        job, first = chunk.job, chunk.job.computed
        step.prefill += chunk.end - first
        for number in range(first // BLOCK_TOKENS, min(chunk.end // BLOCK_TOKENS, len(job.hashes))):
            job.blocks[number] = self.manager.store(job.hashes[number], job.blocks[number])
        job.computed = chunk.end
        if job.computed == job.prompt and job.produced == 1:
            # The token that it had before it was preempted is the next row of a decode step.
            self._prefilling.remove(job)
            self._enter(job)
        if job.computed < job.known:
            return
        self._prefilling.remove(job)
        if not job.produced:
            step.first.append(job)
        elif self._naming:
            step.decoded.append(job)
        job.produced += 1
        if job.produced >= job.answer:
            step.finished.append(job)
        else:
            self._enter(job)

    def _enter(self, job: Job) -> None:
        self._decoding[job.id] = job
        job.began = self._steps
        self._context += job.known
        self._growing[self._growth(job)][job.id] = job
        heapq.heappush(self._ends, (job.began + job.answer - job.produced, job.id, job))

    def _leave(self, job: Job) -> None:
        del self._decoding[job.id]
        del self._growing[self._growth(job)][job.id]
        job.produced += self._steps - job.began
        self._context -= job.known

    def _growth(self, job: Job) -> int:
        # Its next token is written behind the `known - 1` ones whose keys and values are there.
        return (job.began - (job.known - 1)) % BLOCK_TOKENS

    def _running(self) -> Iterator[Job]:
        yield from self._prefilling
        yield from self._decoding.values()


def _order(job: Job) -> tuple[int, int]:
    return job.order


def _triangle(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


def _chunk_end(job: Job, budget: int) -> int:
    """Where the next chunk ends: at the last multiple of a block within the budget, or at the target."""
    if job.target - job.computed <= budget:
        return job.target
    return max(job.computed, (job.computed + budget) // BLOCK_TOKENS * BLOCK_TOKENS)


def _awaits(job: Job, begun: set[int]) -> bool:
    """Whether the prompt's next block is being computed for somebody before, and will be found cached."""
    if not begun or job.computed % BLOCK_TOKENS:
        return False
    number = job.computed // BLOCK_TOKENS
    return number < job.usable and job.hashes[number] in begun
