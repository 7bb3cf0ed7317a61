"""The language of scenarios: a seed, a load, a list of timed events, a list of checks. Values only."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.faults.verdict import Counts
    from tests.faults.world import World


@dataclass(frozen=True, slots=True)
class Shape:
    """The fleet that a scenario needs. Scenarios of one shape share a fleet, which is healed between them."""

    workers: int = 3
    schedulers: int = 2
    gateways: int = 2
    members: int = 1
    """Members of etcd."""
    speed: int = 30
    """Tokens per second of one stream."""
    proxied: bool = False
    """A fault proxy before each worker and each scheduler, and before etcd one for each service."""
    doubles: bool = False
    """Schedulers and gateways take orders too (see `doubles`)."""
    small_disk: int = 0
    """Bytes of the file system that etcd's data and all logs lie on; 0: the disk."""
    apart: bool = False
    """Workers and schedulers in network namespaces of their own, behind one router."""
    torch: bool = False
    """Workers run a small real model instead of the echo backend."""
    worker_flags: tuple[str, ...] = ()
    scheduler_flags: tuple[str, ...] = ()
    gateway_flags: tuple[str, ...] = ()
    collector: bool = False
    """Spans are exported to a collector process."""
    open_files: int = 0
    """`ulimit -n` of the gateways; 0: as it is."""


@dataclass(frozen=True, slots=True)
class Load:
    """What clients do meanwhile."""

    streams: int = 12
    tokens: int = 120
    askers: int = 2
    """Clients that ask for a short answer, again and again, until the last event is over."""
    returns: bool = True
    """A client whose connection breaks comes back at another gateway with `Last-Event-ID`."""
    kinds: tuple[str, ...] = ("greedy",)
    """Of the streams in turn (see `clients.KINDS`)."""
    model: str = "echo"
    unknown: bool = False
    """Nobody can compute the answers: an undisturbed run comes first and says what they are."""
    leavers: int = 0
    """So many of the streams reset their connection at a token that the seed says, and do not come back."""
    returners: int = 0
    """So many more do, and come back some seconds later behind any event that they had."""
    prompt: str = "story"
    patience_s: float = 45.0
    """A stream that has not ended by then counts as lost."""


MIX = ("greedy", "seeded", "four", "penalties", "json")
_MOST_TOKENS = 1500
"""The small model's context ends somewhere."""

Act = Callable[["World"], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that is done once the slowest stream has so many `tokens`, or `after_s` after the last event."""

    what: str
    act: Act
    tokens: int = 0
    after_s: float = 0.0


Check = Callable[["World"], Awaitable[str]]
"""Looks at the world after the load has ended; says what is wrong, or nothing."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One story of what goes wrong."""

    name: str
    row: str
    """The fault as the specification calls it."""
    events: tuple[Event, ...]
    shape: Shape = Shape()
    load: Load = Load()
    checks: tuple[tuple[str, Check], ...] = ()
    notice: str = ""
    """Pattern of the line of a log that shows that the fault was noticed."""
    errors: frozenset[str] = frozenset()
    """Codes of typed errors that clients may see; of any other, none."""
    targets: Mapping[str, float] = field(default_factory=dict)
    """Times: `detection_s`, `gap_s` and what the events measure; at most so much is wanted, and reported."""
    quick: bool = False
    echo: bool = False
    """Only the echo backend can do it."""
    note: str = ""
    """What the table should say besides."""


def on_torch(scenario: Scenario) -> Scenario | None:
    """The same with a small real model and every kind of request; None if that makes no sense."""
    shape, load = scenario.shape, scenario.load
    if scenario.echo or shape not in (Shape(), Shape(proxied=True)):
        return None
    return replace(
        scenario,
        name=f"{scenario.name} (torch)",
        shape=replace(shape, torch=True),
        load=replace(load, model="tiny", unknown=True, kinds=MIX, tokens=min(load.tokens, _MOST_TOKENS)),
    )


@dataclass(slots=True)
class Result:
    """What a scenario found."""

    name: str
    row: str
    seed: int
    counts: Counts
    times: dict[str, float] = field(default_factory=dict)
    targets: Mapping[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)
    wall_s: float = 0.0
    note: str = ""
    gaps: list[float] = field(default_factory=list)
    """Seconds, of each stream: its longest pause beyond that between two tokens."""
    picture: str = ""
    """The trace of a request that moved, as SVG, where a check looked for one."""

    @property
    def ok(self) -> bool:
        """Counts are 0 and every check holds. Times are not judged."""
        return self.counts.clean and not self.failures

    @property
    def late(self) -> list[str]:
        """Times past their targets."""
        return [name for name, target in self.targets.items() if self.times.get(name, 0.0) > target]
