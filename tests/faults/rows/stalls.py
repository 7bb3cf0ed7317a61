"""What is not dead but does not get on: engines that hang, streams that stand still, workers that are slow."""

from __future__ import annotations

from tests.faults.acts import freeze, order, pause, recall, thaw, until_counted, until_moved, worker
from tests.faults.checks import at_least, moved_elsewhere
from tests.faults.kernel_acts import limit_cpu, unlimit_cpu
from tests.faults.scenario import Event, Load, Scenario, Shape

FAST = Shape(speed=100, workers=3)

SCENARIOS = (
    Scenario(
        "engine hangs",
        "engine hangs, RPC alive",
        (
            Event("SIGSTOP to an engine, its worker answers", freeze(worker(), engine_only=True), tokens=60),
            Event("the step counter tells", until_counted("hangs")),
            Event("its streams move", until_moved(worker())),
            Event("SIGCONT, late tokens are marked", thaw(worker())),
            Event("what it still had is refused", pause(1.0)),
        ),
        load=Load(tokens=400),
        checks=(("re-dispatches land elsewhere, the trace says why", moved_elsewhere()),),
        targets={"detection_s": 3.0, "gap_s": 3.0},
    ),
    Scenario(
        "streams stand still",
        "stream stalls after k tokens",
        (
            Event("half of a worker's streams get nothing any more", order(worker(), "mute"), tokens=80),
            Event("their bound tells", until_counted("stalls")),
            Event("they move", pause(4.0)),
            Event("the worker is well again", recall(worker(), "mute")),
        ),
        load=Load(streams=16, tokens=400),
        checks=(
            ("their bounds told", at_least("stalls")),
            ("re-dispatches land elsewhere, the trace says why", moved_elsewhere()),
        ),
        targets={"detection_s": 3.0, "gap_s": 3.0},
    ),
    Scenario(
        "first tokens come late",
        "worker 10 x slower",
        (
            Event("what begins on a worker waits for three seconds", order(worker(), "late"), tokens=150),
            Event("others begin it too, and win", until_counted("hedges_won")),
            Event("it lasts", pause(4.0)),
            Event("it begins at once again", recall(worker(), "late")),
        ),
        load=Load(streams=9, tokens=450, askers=6, patience_s=60),
        checks=(("a second attempt had the first token", at_least("hedges_won")),),
        note="noticed once something lands there; the placement then sends it no more",
    ),
    Scenario(
        "worker ten times slower",
        "worker 10 x slower",
        (
            Event("a worker gets 1 % of a processor", limit_cpu(worker(), 0.01), tokens=100),
            Event("its streams move", until_moved(worker(), 20.0)),
            Event("it gets all of it again", unlimit_cpu(worker())),
        ),
        FAST,
        Load(streams=18, tokens=1500, patience_s=90),
        targets={"gap_s": 10.0},
    ),
)
