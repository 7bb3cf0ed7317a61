"""What happens to etcd, to disks and to clocks."""

from __future__ import annotations

from tests.faults.acts import kill, pause, restart, until_answered, until_whole, worker
from tests.faults.checks import all_alive, never, not_logged, same_leader
from tests.faults.kernel_acts import (
    clear_disk,
    compact_etcd,
    fill_disk,
    jump_clocks,
    kill_etcd_leader,
    revive_etcd,
    stop_etcd,
    until_written,
)
from tests.faults.network_acts import heal, stall
from tests.faults.rows.workers import LOST, PROXIED
from tests.faults.scenario import Event, Load, Scenario, Shape

THREE = Shape(members=3)
SMALL = Shape(small_disk=160 << 20)
ORDERED = Shape(doubles=True)


def outage(seconds: float, tokens: int) -> Scenario:
    """etcd is gone for so long."""
    return Scenario(
        f"etcd gone for {seconds:.0f} s",
        "etcd gone for 10 minutes (the leader alive)",
        (
            Event("SIGKILL to every member", stop_etcd(), tokens=20),
            Event("it lasts", pause(seconds)),
            Event("etcd is back", revive_etcd("converged_s")),
        ),
        load=Load(tokens=tokens, patience_s=seconds + 90),
        checks=(("nobody expired a worker", not_logged(LOST)), ("the leader led on", same_leader())),
        targets={"gap_s": 1.0, "converged_s": 10.0},
        note="" if seconds >= 600 else "10 minutes: --long",
    )


SCENARIOS = (
    Scenario(
        "etcd's leader killed",
        "etcd leader lost",
        (
            Event("SIGKILL to the member that leads", kill_etcd_leader(), tokens=20),
            Event("etcd takes a write again", until_written("control_s")),
            Event("a new request is answered", until_answered()),
        ),
        THREE,
        checks=(("nobody expired a worker", not_logged(LOST)), ("the leader led on", same_leader())),
        targets={"gap_s": 1.0, "control_s": 5.0},
    ),
    Scenario(
        "compaction during a watch",
        "compaction during a watch",
        (
            Event("watches fall silent", stall("etcd-scheduler"), tokens=20),
            Event("a worker dies", kill(worker())),
            Event("its lease ends unseen", pause(6.0)),
            Event("another comes", restart(worker())),
            Event("history is forgotten", compact_etcd()),
            Event("watches go on", heal("etcd-scheduler")),
            Event("the leader sees who is there", until_whole("converged_s")),
        ),
        PROXIED,
        Load(tokens=500),
        targets={"gap_s": 1.0, "converged_s": 10.0},
    ),
    Scenario(
        "disk full",
        "disk full",
        (
            Event("no byte fits on the disk of logs and etcd", fill_disk(), tokens=20),
            Event("it lasts", pause(6.0)),
            Event("there is room again", clear_disk()),
        ),
        SMALL,
        Load(tokens=300),
        checks=(("every service lives", all_alive()),),
        targets={"gap_s": 1.0},
    ),
    Scenario(
        "clocks jump by a day",
        "clock jumps",
        (
            Event("every wall clock jumps by a day, this way or that", jump_clocks(86_400), tokens=20),
            Event("it lasts", pause(3.0)),
            Event("and by a year", jump_clocks(31_536_000)),
            Event("it lasts", pause(3.0)),
        ),
        ORDERED,
        Load(tokens=250),
        checks=(
            ("nobody expired a worker", not_logged(LOST)),
            ("nothing was tried again", never("retries")),
            ("the leader led on", same_leader()),
        ),
        targets={"gap_s": 1.0},
    ),
)
