"""Who waits and who runs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.fakes.kv import NotedMemory
from worker.backend import Attempt, Epoch
from worker.engine.batch import Batch, plan
from worker.engine.blocks import BlockManager
from worker.engine.roster import Roster
from worker.engine.run import Run

pytestmark = pytest.mark.torch


class Loop:
    """The engine's loop without a model: every pick is token 7."""

    def __init__(self, blocks: int, max_running: int = 64) -> None:
        self.manager = BlockManager(blocks)
        self.roster = Roster(self.manager, NotedMemory(), max_running)
        self._arrivals = itertools.count()

    def add(self, name: str, prompt: int, max_tokens: int = 500, **options: Any) -> Run:
        attempt = Attempt(name, Epoch(1, 1), "m", [3] * prompt, max_tokens, **options)
        run = Run(attempt, frozenset(), next(self._arrivals))
        self.roster.add(run)
        return run

    def step(self) -> Batch:
        list(self.roster.start())
        running = self.roster.running
        for run in running:
            run.adopt()
        batch = plan(running)
        self.roster.make_room(batch)
        pickers = list(batch.pickers())
        batch.computed()
        for picker in pickers:
            picker.run.append(picker.choice, 7)
            if picker.run.finish(picker.choice) is not None:
                picker.run.drop(picker.choice)
        for run in self.roster.running:
            if not run.choices:
                self.roster.forget(run)
        return batch

    @property
    def names(self) -> list[str]:
        return [run.attempt.request_id for run in self.roster.running]


def test_who_comes_last_gives_way_and_goes_on_later() -> None:
    loop = Loop(6)
    first, second = loop.add("first", 120, 200), loop.add("second", 60, 200)
    seen: list[list[str]] = []
    for _ in range(900):
        if not loop.roster:
            break
        loop.step()
        if loop.names and loop.names not in seen[-1:]:
            seen.append(loop.names)
    assert seen == [["first", "second"], ["first"], ["second"]]
    assert loop.roster.preemptions == 1
    assert (first.produced, second.produced) == (200, 200)
    assert loop.manager.free == 6


def test_a_class_goes_before_those_below_and_takes_their_place() -> None:
    loop = Loop(8, max_running=2)
    for name in ("batch 1", "batch 2"):
        loop.add(name, 10, priority=2)
    loop.step()
    loop.add("standard", 10, priority=1)
    loop.step()
    assert loop.names == ["standard", "batch 1"]
    loop.add("interactive", 10, priority=0)
    loop.step()
    assert loop.names == ["interactive", "standard"]
    loop.add("interactive 2", 10, priority=0)
    loop.add("late batch", 10, priority=2)
    loop.step()
    assert loop.names == ["interactive", "interactive 2"]
    for name in ("interactive", "interactive 2", "standard"):
        run = loop.roster.find(name)
        assert run is not None
        loop.roster.forget(run)
    loop.step()
    assert loop.names == ["batch 1", "batch 2"]


def test_a_change_of_class_counts_from_the_next_step_on() -> None:
    loop = Loop(8, max_running=1)
    running, waiting = loop.add("running", 10, priority=1), loop.add("waiting", 10, priority=2)
    loop.step()
    assert loop.names == ["running"]
    loop.roster.set_priority(waiting, 0)
    loop.step()
    assert loop.names == ["waiting"]
    loop.roster.set_priority(waiting, 2)
    loop.step()
    assert loop.names == ["running"]
    assert (running.priority, waiting.priority) == (1, 2)


def test_equals_do_not_take_each_others_place() -> None:
    loop = Loop(4)
    loop.add("first", 100, 20)
    loop.add("big", 150, 20)
    loop.add("small", 5, 5)
    loop.step()
    assert loop.names == ["first"]
    assert loop.roster.preemptions == 0


def test_more_choices_than_may_run_go_alone() -> None:
    loop = Loop(20, max_running=4)
    loop.add("wide", 10, 3, choices=6)
    loop.add("next", 10, 3)
    batches = [loop.step() for _ in range(3)]
    assert {span.run.attempt.request_id for batch in batches for span in batch.spans} == {"wide"}
    loop.step()
    assert loop.names == ["next"]


def test_the_same_prompt_is_computed_once() -> None:
    loop = Loop(30)
    hashes = tuple(range(100, 105))
    loop.add("first", 330, prefix_hashes=hashes)
    loop.add("second", 350, prefix_hashes=hashes)
    loop.add("third", 320, prefix_hashes=hashes)
    rows: dict[str, int] = {}
    for _ in range(5):
        for span in loop.step().spans:
            if span.choice is None:
                name = span.run.attempt.request_id
                rows[name] = rows.get(name, 0) + span.end - span.first
    assert rows == {"first": 330, "second": 350 - 320, "third": 320 - 256}
    cached = {run.attempt.request_id: run.take_cached() for run in loop.roster.running}
    assert cached == {"first": 0, "second": 320, "third": 256}


def test_all_get_done_however_few_the_blocks() -> None:
    loop = Loop(9)
    runs = [
        loop.add(str(number), 30 + 50 * (number % 3), 150, choices=1 + number % 2, priority=number % 3)
        for number in range(12)
    ]
    for _ in range(20_000):
        if not loop.roster:
            break
        loop.step()
    assert [run.produced for run in runs] == [150 * (1 + number % 2) for number in range(12)]
    assert loop.roster.preemptions > 1
    assert loop.manager.free == 9
