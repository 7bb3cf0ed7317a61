"""Many clients at once, and what stands beside the service: slow readers, herds, a trace collector that hangs."""

from __future__ import annotations

from tests.faults.acts import freeze, some, thaw
from tests.faults.checks import all_alive, at_most, never, no_more_decisions, not_logged, same_leader
from tests.faults.crowd_acts import burst, in_turns, restart_everything, returned, slow_readers
from tests.faults.rows.gateways import BROKEN
from tests.faults.rows.workers import LOST
from tests.faults.scenario import Event, Load, Scenario, Shape

COLLECTED = Shape(collector=True)
IMPATIENT = Shape(speed=5, gateway_flags=("--limits-write-timeout-s", "5"))
NARROW = Shape(worker_flags=("--memory-limit", "4194304"), scheduler_flags=("--ttft-bounds-s", "4,4,4"))
_BUSY = frozenset({"overloaded", "too_many_requests", "unavailable"})
_READERS, _GROWN_MIB = 500, 500
"""Each may hold up a megabyte in its gateway, and no more."""

SCENARIOS = (
    Scenario(
        "trace collector hangs",
        "trace collector hangs",
        (
            Event(
                "SIGSTOP to the collector, SIGCONT, and again",
                in_turns("answers", freeze(some("collector")), thaw(some("collector")), rounds=2, seconds=8.0),
                tokens=20,
            ),
        ),
        COLLECTED,
        Load(tokens=1100, askers=6, patience_s=90),
        checks=(
            ("no decision changes", no_more_decisions(3)),
            ("nothing was tried again", never("retries")),
            ("nobody was lost", not_logged(LOST)),
            ("the leader led on", same_leader()),
        ),
        targets={"answers_pct": 1.0},
        note="the median of short answers while the collector is frozen, against the times between; decisions: "
        "retries, hedges, moves, stalls, ejections in either",
    ),
    Scenario(
        "slow readers",
        "slow reader",
        (Event("500 clients read all, then one byte a second", slow_readers(_READERS, 15.0, 30.0), tokens=20),),
        IMPATIENT,
        Load(tokens=300, patience_s=120),
        checks=(
            ("the gateways' memory is bounded", at_most("grown_mib", _GROWN_MIB)),
            ("every service lives", all_alive()),
        ),
        targets={"others_p99_pct": 10.0},
        note="gateways that wait 5 s for a client to take what was written",
    ),
    Scenario(
        "thundering herd",
        "thundering herd",
        (Event("160 requests in one moment", burst(160, 100, _BUSY), tokens=60),),
        NARROW,
        Load(tokens=500, askers=4, patience_s=90),
        checks=(("every service lives", all_alive()),),
        errors=_BUSY,
        targets={"recovered_s": 10.0},
        note="ten times as many as there were; each is answered, or refused with Retry-After. Where all come before "
        "anybody has waited, speed is not known yet and hardly one is refused: then it takes longer",
    ),
    Scenario(
        "restart of everything",
        "thundering herd",
        (Event("SIGKILL to every process at once, etcd too, while clients ask", restart_everything(), after_s=1.0),),
        load=Load(streams=0, askers=24),
        errors=BROKEN | _BUSY | {"ReadTimeout"},
        targets={"recovered_s": 10.0},
    ),
    Scenario(
        "clients return at any offset",
        "client gone",
        (Event("RST at any token, return behind any earlier one", returned(24), after_s=0.1),),
        load=Load(streams=24, tokens=240, returners=24, kinds=("greedy", "seeded", "four"), patience_s=90),
        note="the same bytes from there on, at the other gateway",
    ),
)
