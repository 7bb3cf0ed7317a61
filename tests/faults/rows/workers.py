"""What happens to workers."""

from __future__ import annotations

from tests.faults.acts import (
    freeze,
    kill,
    kill_engine,
    order,
    pause,
    recall,
    thaw,
    until_logged,
    until_moved,
    worker,
)
from tests.faults.network_acts import heal, reset, roughen, stall
from tests.faults.scenario import Event, Load, Scenario, Shape

LOST = r"worker \S+ lost"
ENGINE_ENDED = r"the engine process ended"
PROXIED = Shape(proxied=True)
_LATE = "what the thawed worker still had is refused"

SCENARIOS = (
    Scenario(
        "worker killed",
        "worker killed",
        (Event("SIGKILL to a worker", kill(worker()), tokens=20), Event("it is noticed", until_logged(LOST))),
        notice=LOST,
        targets={"detection_s": 0.3, "gap_s": 1.0},
        quick=True,
    ),
    Scenario(
        "engine killed",
        "worker killed",
        (Event("SIGKILL to an engine", kill_engine(worker()), tokens=20),),
        notice=ENGINE_ENDED,
        targets={"detection_s": 0.3, "gap_s": 1.0},
    ),
    Scenario(
        "worker frozen 2 s",
        "worker frozen",
        (
            Event("SIGSTOP to a worker and its engine", freeze(worker()), tokens=20),
            Event("it lasts", pause(2.0)),
            Event("SIGCONT", thaw(worker(), stale=False)),
        ),
        targets={"gap_s": 2.5},
        note="shorter than the noticing may be: either way the bytes are the same",
    ),
    Scenario(
        "worker frozen 10 s",
        "worker frozen",
        (
            Event("SIGSTOP to a worker and its engine", freeze(worker()), tokens=20),
            Event("its streams move", until_moved(worker())),
            Event("it lasts", pause(8.0)),
            Event("SIGCONT, late tokens are marked", thaw(worker())),
            Event(_LATE, pause(1.0)),
        ),
        load=Load(tokens=500),
        notice=LOST,
        targets={"detection_s": 2.0, "gap_s": 2.5},
    ),
    Scenario(
        "worker frozen 60 s",
        "worker frozen",
        (
            Event("SIGSTOP to a worker and its engine", freeze(worker()), tokens=20),
            Event("its streams move", until_moved(worker())),
            Event("it lasts", pause(58.0)),
            Event("SIGCONT, late tokens are marked", thaw(worker())),
            Event(_LATE, pause(1.0)),
        ),
        load=Load(tokens=2000, patience_s=120),
        notice=LOST,
        targets={"detection_s": 2.0, "gap_s": 2.5},
    ),
    Scenario(
        "worker frozen and thawed at once",
        "worker frozen",
        (
            Event("SIGSTOP to a worker and its engine", freeze(worker()), tokens=20),
            Event("its streams move", until_moved(worker())),
            Event("SIGCONT, late tokens are marked", thaw(worker())),
            Event(_LATE, pause(1.0)),
        ),
        load=Load(tokens=220),
        notice=LOST,
        targets={"detection_s": 2.0, "gap_s": 2.5},
        quick=True,
    ),
    Scenario(
        "stream stalls",
        "stream stalls after k tokens",
        (
            Event("the proxy before a worker holds its answers", stall(worker(), "down"), tokens=20),
            Event("its streams move", until_moved(worker())),
            Event("late tokens are marked, and let go", order(worker(), "stale")),
            Event("the proxy passes again", heal(worker())),
            Event("late tokens arrive", pause(1.0)),
        ),
        PROXIED,
        Load(tokens=220),
        notice=LOST,
        targets={"detection_s": 2.0, "gap_s": 2.5},
    ),
    Scenario(
        "orders to a worker are held up",
        "stream stalls after k tokens",
        (
            Event("the proxy before a worker holds what it is told", stall(worker(), "up"), tokens=20),
            Event("it lasts", pause(4.0)),
            Event("the proxy passes again", heal(worker())),
        ),
        PROXIED,
        Load(tokens=150),
        targets={"gap_s": 2.5},
    ),
    Scenario(
        "worker's connections reset",
        "stream stalls after k tokens",
        (Event("RST on every connection of a worker", reset(worker()), tokens=20),),
        PROXIED,
        notice=LOST,
        targets={"detection_s": 0.3, "gap_s": 1.0},
    ),
    Scenario(
        "rough network",
        "stream stalls after k tokens",
        (
            Event("7 bytes at a time, 50 ms late", roughen(worker(), delay_s=0.05, slice_bytes=7), tokens=20),
            Event("it lasts", pause(3.0)),
            Event("the proxy passes again", heal(worker())),
        ),
        PROXIED,
    ),
    Scenario(
        "invalid output",
        "corrupt or invalid frame",
        (
            Event("a worker's indices skip ahead", order(worker(), "invalid"), tokens=20),
            Event("it lasts", pause(1.0)),
            Event("they are right again", recall(worker(), "invalid")),
        ),
        load=Load(tokens=150),
    ),
)
