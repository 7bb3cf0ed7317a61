"""The engine model takes the steps of the real engine's admission, batches and blocks, and loses no token."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import pytest

from bench.simulated.cost import StepCost, fitted
from bench.simulated.engine import Engine
from bench.simulated.job import Job
from bench.simulated.workloads import blocks
from tests.fakes.kv import NotedMemory
from worker.backend import Attempt, Epoch
from worker.engine.batch import plan
from worker.engine.blocks import BlockManager
from worker.engine.roster import Roster
from worker.engine.run import Run

pytestmark = pytest.mark.torch

COST = StepCost(fixed=1.0, decode=0.1, context=0.001, chunk=0.5, prefill=0.01, attended=0.0)


@dataclass
class Taken:
    """What a step came to."""

    prefill: int = 0
    decodes: int = 0
    tokens: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    free: int = 0


class RealLoop:
    """The real engine's loop without a model, for requests that end after a known number of tokens."""

    def __init__(self, total: int, max_running: int) -> None:
        self.manager = BlockManager(total)
        self.roster = Roster(self.manager, NotedMemory(), max_running)
        self.answers: dict[str, int] = {}
        self._arrivals = itertools.count()

    def add(self, job: Job, priority: int) -> None:
        attempt = Attempt(
            job.id, Epoch(1, 1), "m", [3] * job.prompt, job.max_tokens, prefix_hashes=job.hashes, priority=priority
        )
        self.answers[job.id] = job.answer
        self.roster.add(Run(attempt, frozenset(), next(self._arrivals)))

    def step(self) -> Taken:
        taken = Taken()
        list(self.roster.start())
        running = self.roster.running
        for run in running:
            run.adopt()
        batch = plan(running)
        self.roster.make_room(batch)
        pickers = list(batch.pickers())
        for span in batch.spans:
            if span.choice is not None and span.end - span.first == 1 and span.run.pending(span.choice) == 1:
                taken.decodes += 1
            else:
                taken.prefill += span.end - span.first
        batch.computed()
        for picker in pickers:
            run, name = picker.run, picker.run.attempt.request_id
            run.append(picker.choice, 7)
            taken.tokens.append(name)
            if len(picker.choice.tokens) >= self.answers[name]:
                run.drop(picker.choice)
                self.roster.forget(run)
                taken.finished.append(name)
        taken.free = self.manager.free
        return taken


def model_step(engine: Engine) -> Taken:
    assert engine.begin() is not None
    step = engine.end()
    names = [job.id for job in (*step.first, *step.decoded)]
    return Taken(step.prefill, step.decodes, names, [job.id for job in step.finished], engine.manager.free)


def scenario(rng: random.Random, count: int) -> list[tuple[int, int, Job]]:
    """Requests with the step before which each comes and its class: shared prefixes, long and short ones."""
    found = []
    for number in range(count):
        shared, prompt = 64 * rng.randrange(4), rng.choice((1, 63, 64, 65, 128, 200, 300, rng.randrange(1, 500)))
        full, common = prompt // 64, min(shared, prompt) // 64
        hashes = blocks(rng.randrange(2), 0, common) + blocks(100 + number, common, full)
        answer = rng.randrange(1, 150)
        job = Job(f"r{number}", prompt, hashes, answer, answer + rng.randrange(60))
        found.append((rng.randrange(120), rng.randrange(2), job))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_the_model_takes_the_real_loops_steps(seed: int) -> None:
    rng = random.Random(seed)
    total, most = rng.choice((12, 20, 60)), rng.choice((3, 64))
    engine, real = Engine(total, COST, max_running=most, naming=True), RealLoop(total, most)
    coming, left = scenario(rng, 24), 24
    for number in range(20_000):
        for _, priority, job in [one for one in coming if one[0] == number]:
            engine.admit(job, priority)
            real.add(job, priority)
        if not real.roster:
            continue
        mine, theirs = model_step(engine), real.step()
        mine.tokens.sort()
        theirs.tokens.sort()
        mine.finished.sort()
        theirs.finished.sort()
        assert mine == theirs, f"step {number}"
        left -= len(mine.finished)
        if not left:
            break
    assert left == 0 and len(engine) == 0
    assert engine.preemptions == real.roster.preemptions
    assert engine.manager.free == total


def test_every_token_is_made_once() -> None:
    engine = Engine(40, COST, naming=True)
    answers = {f"r{number}": 1 + 7 * number for number in range(12)}
    for number, (name, answer) in enumerate(answers.items()):
        engine.admit(Job(name, 40 + 31 * number, [], answer, answer))
    made: dict[str, int] = dict.fromkeys(answers, 0)
    while engine.begin() is not None:
        step = engine.end()
        for job in (*step.first, *step.decoded):
            made[job.id] += 1
    assert made == answers
    assert engine.used == 0


def test_a_step_costs_what_it_computes() -> None:
    engine = Engine(40, COST, speed=2.0)
    engine.admit(Job("long", 200, [], 3, 3))
    assert engine.begin() == pytest.approx((1.0 + 0.5 + 0.01 * 128) / 2)
    engine.end()
    assert engine.begin() == pytest.approx((1.0 + 0.5 + 0.01 * 72) / 2)
    assert [job.id for job in engine.end().first] == ["long"]
    assert engine.begin() == pytest.approx((1.0 + 0.1 + 0.001 * 201) / 2)
    engine.end()
    assert engine.busy_s == pytest.approx((1.0 + 0.5 + 1.28 + 1.0 + 0.5 + 0.72 + 1.0 + 0.1 + 0.201) / 2)


def test_the_cache_forgets_the_least_recently_used_prefix() -> None:
    engine = Engine(8, COST)

    def serve(name: str, stream: int) -> int:
        job = Job(name, 200, blocks(stream, 0, 3), 2, 2)
        engine.admit(job)
        removed: list[int] = []
        while engine.begin() is not None:
            removed += engine.end().removed
        gone.extend(removed)
        return job.cached

    gone: list[int] = []
    assert serve("a", 1) == 0
    assert serve("b", 2) == 0
    assert serve("a again", 1) == 192
    assert serve("c", 3) == 0
    assert gone == list(reversed(blocks(2, 0, 3)))[:1] + list(reversed(blocks(2, 0, 3)))[1 : len(gone)]
    assert serve("a at last", 1) == 192


def test_a_cancelled_request_gives_its_blocks_back() -> None:
    engine = Engine(40, COST)
    for name in ("waits", "prefills", "decodes"):
        engine.admit(Job(name, 300, [], 50, 50))
    for _ in range(4):
        engine.begin()
        engine.end()
    for name in ("waits", "prefills", "decodes", "unknown"):
        engine.cancel(name)
    assert engine.begin() is None
    assert engine.used == 0 and len(engine) == 0


def test_the_coefficients_that_are_checked_in_are_sensible() -> None:
    cost = fitted()
    assert min(cost.fixed, cost.decode, cost.prefill) > 0
    assert cost.seconds(1, 100, 0, 0) < cost.seconds(16, 1600, 0, 0) < 16 * cost.seconds(1, 100, 0, 0)
