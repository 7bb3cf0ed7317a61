"""What networks do: bits that flip on the way, and directions in which nothing passes."""

from __future__ import annotations

from typing import Literal

from tests.faults.acts import leader, order, pause, recall, until_answered, until_logged, until_moved, worker
from tests.faults.checks import at_least
from tests.faults.network_acts import bit_storm, cut, flip, heal, mend
from tests.faults.rows.schedulers import ELECTED
from tests.faults.rows.workers import LOST, PROXIED
from tests.faults.scenario import MIX, Event, Load, Scenario, Shape

APART = Shape(apart=True)


_STILL_HEARD = (
    "its tokens go on arriving for a second and a half after the cut, until its connection waits for acknowledgements; "
    "counted from the last one, as clients do, it is noticed after the pause"
)


def worker_cut(way: Literal["in", "out"], what: str) -> Scenario:
    """One direction of a worker's network is gone."""
    return Scenario(
        f"{what} a worker",
        "partition, each direction alone",
        (
            Event(f"the router drops: {what} a worker", cut(worker(), way), tokens=20),
            Event("its streams move", until_moved(worker())),
            Event("late tokens are marked", order(worker(), "stale")),
            Event("it lasts", pause(3.0)),
            Event("the way is known again", mend()),
            Event("late tokens arrive", pause(2.0)),
        ),
        APART,
        Load(tokens=400, patience_s=60),
        notice=LOST,
        targets={"detection_s": 3.0, "gap_s": 3.0},
        note=_STILL_HEARD if way == "in" else "",
    )


def leader_cut(way: Literal["in", "out"], what: str) -> Scenario:
    """One direction of the leader's network is gone: towards etcd, gateways and workers alike."""
    return Scenario(
        f"{what} the leader",
        "partition, each direction alone",
        (
            Event(f"the router drops: {what} the leader", cut(leader(), way), tokens=20),
            Event("another is elected", until_logged(ELECTED)),
            Event("a new request is answered", until_answered()),
            Event("it lasts", pause(2.0)),
            Event("the way is known again", mend()),
            Event("the old leader is refused, or has gone", pause(3.0)),
        ),
        APART,
        Load(tokens=450, patience_s=60),
        notice=ELECTED,
        targets={"detection_s": 3.0, "gap_s": 3.0, "new_answer_s": 3.0},
    )


SCENARIOS = (
    Scenario(
        "bits flip in a worker's output",
        "corrupt or invalid frame",
        (
            Event("a bit flips in each of four messages of a worker", flip(worker(), 4, "down"), tokens=20),
            Event("it lasts", pause(4.0)),
            Event("the proxy passes all as it is", heal(worker())),
        ),
        PROXIED,
        Load(tokens=250, patience_s=60),
        notice=LOST,
        targets={"gap_s": 2.5},
    ),
    Scenario(
        "bits flip everywhere",
        "corrupt or invalid frame",
        (
            Event(
                "bits flip on every way, prompts and tokens", bit_storm(("worker", "scheduler"), 12.0, 0.4), tokens=20
            ),
            Event("every proxy passes all as it is", heal("")),
        ),
        PROXIED,
        Load(tokens=550, patience_s=90),
        targets={"gap_s": 5.0},
    ),
    Scenario(
        "logits that are not numbers",
        "corrupt or invalid frame",
        (
            Event("what a worker's model gives is no number", order(worker(), "nan"), tokens=20),
            Event("it lasts", pause(3.0)),
            Event("it is well again", recall(worker(), "nan")),
        ),
        Shape(torch=True),
        Load(streams=9, tokens=300, askers=1, kinds=MIX, model="tiny", unknown=True, patience_s=60),
        checks=(("attempts failed and went on elsewhere", at_least("retries")),),
        errors=frozenset({"internal_error", "unavailable", "overloaded"}),
        note="retries have a budget: a stream waits for it, a new request may be refused",
    ),
    worker_cut("in", "nothing reaches"),
    worker_cut("out", "nothing comes from"),
    leader_cut("in", "nothing reaches"),
    leader_cut("out", "nothing comes from"),
)
