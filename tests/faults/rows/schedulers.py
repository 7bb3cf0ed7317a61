"""What happens to schedulers and to who leads."""

from __future__ import annotations

from tests.faults.acts import freeze, kill, leader, pause, thaw, until_answered, until_logged
from tests.faults.network_acts import heal, stall
from tests.faults.rows.workers import PROXIED
from tests.faults.scenario import Event, Load, Scenario

ELECTED = r"elected in term"
REFUSED = r"of a lower term"

SCENARIOS = (
    Scenario(
        "leader killed",
        "scheduler killed, frozen, failed over",
        (
            Event("SIGKILL to the leader", kill(leader()), tokens=20),
            Event("a new request is answered", until_answered()),
        ),
        load=Load(tokens=200),
        notice=ELECTED,
        targets={"detection_s": 4.0, "gap_s": 5.0, "new_answer_s": 5.0},
        quick=True,
    ),
    Scenario(
        "leader frozen and thawed",
        "scheduler killed, frozen, failed over",
        (
            Event("SIGSTOP to the leader", freeze(leader()), tokens=20),
            Event("another is elected", until_logged(ELECTED)),
            Event("a new request is answered", until_answered()),
            Event("SIGCONT", thaw(leader())),
            Event("the old leader is refused", until_logged(REFUSED)),
        ),
        load=Load(tokens=260),
        notice=ELECTED,
        targets={"detection_s": 4.0, "gap_s": 5.0, "new_answer_s": 5.0},
    ),
    Scenario(
        "leader cut off from etcd",
        "lease expired, worker or leader alive",
        (
            Event("nothing passes to or from etcd", stall("etcd-"), tokens=20),
            Event("every lease expires", pause(8.0)),
            Event("etcd is back", heal("etcd-")),
        ),
        PROXIED,
        Load(tokens=400),
        targets={"gap_s": 1.0},
    ),
)
