"""What clients do, and what is dispatched twice."""

from __future__ import annotations

from tests.faults.acts import kill, leader, leave_all, order, pause, recall, until_answered, worker
from tests.faults.checks import never
from tests.faults.rows.stores import ORDERED
from tests.faults.scenario import Event, Load, Scenario

SCENARIOS = (
    Scenario(
        "clients gone",
        "client gone",
        (Event("RST from every client", leave_all("free_s"), tokens=20),),
        load=Load(streams=16, tokens=4000, askers=0),
        targets={"free_s": 0.5},
    ),
    Scenario(
        "cancels race a failover",
        "a cancel races a dispatch or a failover",
        (
            Event("SIGKILL to the leader, clients leave all the time", kill(leader()), tokens=10),
            Event("a new request is answered", until_answered()),
        ),
        load=Load(streams=32, tokens=200, leavers=24),
        targets={"new_answer_s": 5.0},
    ),
    Scenario(
        "cancels race a migration",
        "a cancel races a dispatch or a failover",
        (
            Event("SIGKILL to a worker, clients leave all the time", kill(worker()), tokens=10),
            Event("it lasts", pause(2)),
        ),
        load=Load(streams=32, tokens=120, leavers=24),
        targets={"gap_s": 1.0},
    ),
    Scenario(
        "dispatches repeated",
        "the same dispatch twice",
        (
            Event("the leader repeats each dispatch, one to five times", order(leader(), "again"), after_s=0.5),
            Event("a worker dies meanwhile", kill(worker()), tokens=20),
            Event("it lasts", pause(2)),
            Event("once again", recall(leader(), "again")),
        ),
        ORDERED,
        checks=(("nothing was computed twice", never("repeated_outputs")),),
    ),
)
