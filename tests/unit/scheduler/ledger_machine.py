"""Random sequences of events against the ledger: whatever happens, no device is given out beyond what it has.

`python -m tests.unit.scheduler.ledger_machine 100000` runs that many sequences, each from a seed of its own, and prints
what it found. Checked after every event, by the ledger's accounts and by the machines' own (`ledger_arena.py`).
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Callable

from llmos.v1 import fleet_pb2
from scheduler import events
from scheduler.policy import Policy
from tests.unit.scheduler.ledger_arena import AVAILABLE, GIB, LOADED, LOADING, LedgerArena, job, replicas

MODELS = {"a": 2, "b": 5, "c": 9}
CLASSES = (
    fleet_pb2.RESOURCE_CLASS_GUARANTEED,
    fleet_pb2.RESOURCE_CLASS_BURSTABLE,
    fleet_pb2.RESOURCE_CLASS_BEST_EFFORT,
)
POLICY = Policy(replica_down_s=3.0, replica_idle_s=2.0, unload_drain_s=1.0, settle_s=0.2, settle_limit_s=0.5)


class LedgerMachine:
    """One sequence. Every action takes its choices from `pick`: a number below its argument."""

    def __init__(self, pick: Callable[[int], int]) -> None:
        self.pick = pick
        self.arena = LedgerArena(POLICY, load_s=0.5)
        self.born = 0
        self.revision = 10
        self.join()

    def join(self) -> None:
        """A worker comes."""
        if len(self.arena.machines) >= 4:
            return
        self.born += 1
        memory = (4, 8, 16, 24)[self.pick(4)] * GIB + self.pick(1000)
        models = {name: size for name, size in MODELS.items() if self.pick(4)} or {"a": 2}
        self.arena.add(f"w{self.born}", models, memory=memory)

    def leave(self) -> None:
        """A worker's stream breaks, or it is gone for good."""
        there = [machine.id for machine in self.arena.machines.values() if machine.connected]
        if there:
            self.arena.lose(there[self.pick(len(there))], for_good=self.pick(3) == 0)

    def come_back(self) -> None:
        """A broken stream is mended."""
        for machine in list(self.arena.machines.values()):
            if not machine.connected and self.pick(2):
                self.arena.back(machine.id)

    def promise_model(self) -> None:
        """Replicas are promised, or promised otherwise."""
        self.revision += 1
        model = ("a", "b", "c")[self.pick(3)]
        least = self.pick(3)
        most = (0, least + self.pick(2))[self.pick(2)]
        pins = tuple(sorted(self.arena.machines))[: self.pick(3)] if not self.pick(3) else ()
        wanted = replicas(f"of-{model}", model, least, most, pinned=pins, kind=CLASSES[self.pick(3)])
        wanted.revision = self.revision
        self.arena.promise(wanted)

    def promise_job(self) -> None:
        """A job is promised room, or other room."""
        self.revision += 1
        memory = (1 + self.pick(12)) * GIB
        self.arena.promise(
            job(f"job-{self.pick(3)}", memory, kind=CLASSES[self.pick(3)], cpu=self.pick(3), revision=self.revision)
        )

    def take_back(self) -> None:
        """A promise ends."""
        names = sorted(self.arena.promises)
        if names:
            self.arena.take_back(names[self.pick(len(names))])

    def ask(self) -> None:
        """Requests arrive."""
        self.arena.ask(("a", "b", "c")[self.pick(3)], tokens=1 + self.pick(20), count=1 + self.pick(8))

    def deliver(self) -> None:
        """Everybody works for a moment."""
        self.arena.now += 0.1 + self.pick(5) / 10
        self.arena.deliver()

    def lag(self) -> None:
        """Time passes and nothing is delivered."""
        self.arena.now += 0.1 + self.pick(20) / 10
        self.arena.post(events.Tick())

    def fail(self) -> None:
        """A load fails, or an engine is lost and loads again."""
        for machine in self.arena.machines.values():
            for name, said in list(machine.states.items()):
                if said.state == LOADING and self.pick(2):
                    machine.ready_at.pop(name, None)
                    machine.say(name, fleet_pb2.MODEL_STATE_FAILED, budget_bytes=0)
                elif said.state == LOADED and self.pick(2):
                    machine.running.clear()
                    machine.say(name, LOADING)
                    machine.ready_at[name] = self.arena.now + 0.5

    def drain(self) -> None:
        """A worker empties itself, or takes work again."""
        ids = sorted(self.arena.machines)
        if ids:
            machine = self.arena.machines[ids[self.pick(len(ids))]]
            machine.draining = not machine.draining

    def lead(self) -> None:
        """Another scheduler is elected."""
        self.arena.fail_over()

    def forget(self) -> None:
        """A worker process starts anew under the same name."""
        there = [machine for machine in self.arena.machines.values() if machine.connected]
        if there:
            machine = there[self.pick(len(there))]
            self.arena.lose(machine.id, for_good=False)
            machine.running.clear()
            machine.ready_at.clear()
            machine.free_at.clear()
            for name in machine.states:
                machine.say(name, AVAILABLE)
            self.arena.back(machine.id)


ACTIONS: tuple[tuple[int, str], ...] = (
    (2, "join"),
    (2, "leave"),
    (3, "come_back"),
    (4, "promise_model"),
    (3, "promise_job"),
    (2, "take_back"),
    (4, "ask"),
    (10, "deliver"),
    (2, "lag"),
    (1, "fail"),
    (1, "drain"),
    (1, "lead"),
    (1, "forget"),
)
NAMES = [name for weight, name in ACTIONS for _ in range(weight)]


def run_sequence(seed: int, length: int = 24) -> Counter[str]:
    """Run one. Raises AssertionError where a device is given out twice; returns what happened."""
    rng = random.Random(seed)
    machine = LedgerMachine(rng.randrange)
    for _ in range(length):
        getattr(machine, rng.choice(NAMES))()
    book = machine.arena.core.state.book
    happened = Counter(machine.arena.core.state.counters)
    happened["loads"] = sum(said.state == LOADED for m in machine.arena.machines.values() for said in m.states.values())
    happened["unloads"] = sum(len(m.unloads) for m in machine.arena.machines.values())
    happened["jobs"] = len(book.jobs)
    happened["reserved"] = len(book.reserved)
    return happened


def main(argv: list[str]) -> int:
    """Entry point: number of sequences, first seed."""
    count = int(argv[1]) if len(argv) > 1 else 1000
    first = int(argv[2]) if len(argv) > 2 else 0
    total: Counter[str] = Counter()
    broken = 0
    began = time.monotonic()
    for seed in range(first, first + count):
        try:
            total += run_sequence(seed)
        except Exception as error:  # whatever it is, the seed says how to see it again
            broken += 1
            sys.stdout.write(f"seed {seed}: {type(error).__name__}: {error}\n")
    sys.stdout.write(
        f"{count} sequences of 24 events in {time.monotonic() - began:.0f} s: {broken} violations; "
        f"{', '.join(f'{name} {value}' for name, value in sorted(total.items()))}\n"
    )
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
