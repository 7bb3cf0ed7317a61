"""Workers that run out of memory: alone."""

from __future__ import annotations

from tests.faults.acts import order, pause, worker
from tests.faults.kernel_acts import limit_memory
from tests.faults.scenario import Event, Load, Scenario

SCENARIOS = (
    Scenario(
        "out of memory",
        "out of memory",
        (
            Event("a worker may take 64 MiB more", limit_memory(worker(), 64 << 20), tokens=20),
            Event("its engine takes more and more", order(worker(), "hog")),
            Event("the kernel ends it", pause(4.0)),
        ),
        load=Load(tokens=260),
        targets={"gap_s": 2.5},
    ),
)
