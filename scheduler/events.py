"""What happens to the core. Values only; protobuf messages inside are handed over and never changed afterwards."""

from __future__ import annotations

from dataclasses import dataclass

from llmos.internal.v1 import journal_pb2, registry_pb2, request_pb2, work_pb2
from llmos.v1 import fleet_pb2
from scheduler.deadlines import Stage


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed. Comes often enough for deadlines to be met to within its period."""


@dataclass(frozen=True, slots=True)
class TermRaised:
    """The same leader was elected again, with a higher term; what runs goes on under the epochs it has."""

    term: int


@dataclass(frozen=True, slots=True)
class WorkerRegistered:
    """A worker's record appeared or changed."""

    record: registry_pb2.WorkerRecord


@dataclass(frozen=True, slots=True)
class WorkerDeregistered:
    """A worker's record is gone. Its stream may well live."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class MembersListed:
    """The first list of workers is complete: everybody who was registered has been announced."""


@dataclass(frozen=True, slots=True)
class WorkerAttached:
    """A stream to a worker began; `report` is what the worker said first."""

    worker_id: str
    report: work_pb2.WorkerReport


@dataclass(frozen=True, slots=True)
class WorkerFrame:
    """A frame of a worker's stream, in order."""

    worker_id: str
    frame: work_pb2.WorkFrame


@dataclass(frozen=True, slots=True)
class WorkerDetached:
    """A worker's stream ended, or went silent for too long."""

    worker_id: str
    reason: str
    damaged: bool = False
    """What it said, or was told, did not arrive as it was said."""


@dataclass(frozen=True, slots=True)
class GatewayConnected:
    """A gateway's stream began. `stream_id` is unique; the node's id is the gateway's own, over reconnects."""

    stream_id: int
    node: fleet_pb2.Node


@dataclass(frozen=True, slots=True)
class GatewayLost:
    """A gateway's stream ended."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class Submitted:
    """A gateway hands over a request, new or to be taken up again."""

    stream_id: int
    request: request_pb2.Request
    sealed: bytes = b""
    """For the journal: what gateways need to go on with the text."""
    origin_id: str = ""
    """Name under which its client may ask for it again; empty: the request's id."""
    claim: int = 0
    """The journal's, under which it goes on; 0: its client has not come back to it."""


@dataclass(frozen=True, slots=True)
class TakeUpAsked:
    """A gateway asks for a stream that a client has come back to. `call` names the answer."""

    call: int
    tenant: str
    origin_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FollowerJoined:
    """A scheduler that stands by wants the journal. `follower` names its stream."""

    follower: int


@dataclass(frozen=True, slots=True)
class FollowerLeft:
    """Its stream ended."""

    follower: int


@dataclass(frozen=True, slots=True)
class JournalInherited:
    """What this scheduler knows of an earlier leader's journal, oldest first; and ids that were cancelled, with the
    reasons."""

    entries: tuple[journal_pb2.JournalEntry, ...]
    cancelled: tuple[tuple[str, str], ...]
    quarantined: tuple[tuple[str, str, float], ...] = ()
    """Marks of prompts that workers died of, the requests by which that was found, and seconds of quarantine left."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A gateway stops a request."""

    stream_id: int
    request_id: str
    reason: str
    claim: int = 0
    """Under which it was submitted."""


@dataclass(frozen=True, slots=True)
class Killed:
    """A person stops a request through the Fleet API; its gateway is told."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Reprioritized:
    """A person moves a request to another class of service."""

    request_id: str
    priority: request_pb2.PriorityClass.ValueType


@dataclass(frozen=True, slots=True)
class ServiceInherited:
    """What an earlier leader wrote down of the service that tenants have had."""

    record: registry_pb2.ServiceRecord


@dataclass(frozen=True, slots=True)
class DrainOrdered:
    """A person empties a worker, or takes it back into service."""

    worker_id: str
    undo: bool


@dataclass(frozen=True, slots=True)
class DrainDue:
    """Timer: look for places for what still runs on a worker that empties itself. `look` counts its drains."""

    worker_id: str
    look: int


@dataclass(frozen=True, slots=True)
class ChoiceFinished:
    """A gateway has seen enough of a choice: tokens from index `keep_until` on are not wanted."""

    stream_id: int
    request_id: str
    choice: int
    keep_until: int


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """Timer: the client of a request gives up now."""

    request_id: str


@dataclass(frozen=True, slots=True)
class RetryDue:
    """Timer: a request whose attempt failed may wait for a worker again."""

    request_id: str


@dataclass(frozen=True, slots=True)
class AttemptStalled:
    """An open span of a stage has passed its learned bound. Comes again while that lasts."""

    request_id: str
    term: int
    attempt: int
    """0: the request waits in the queue."""
    stage: Stage
    """`step`: the engine of the attempt's worker stands still."""
    waited_s: float
    """Since the stage began, or since its last progress."""
    bound_s: float


@dataclass(frozen=True, slots=True)
class AttemptLate:
    """A prefill takes longer than most do, though not as long as one that stalls. Comes again while that lasts."""

    request_id: str
    term: int
    attempt: int
    waited_s: float
    bound_s: float


@dataclass(frozen=True, slots=True)
class WorkerSlow:
    """By its spans, a worker takes `ratio` times as long as its peers' median. Comes again while that lasts."""

    worker_id: str
    ratio: float
    usual_known: bool
    """It is also slow compared with itself; False: it was not seen for long enough to tell."""


@dataclass(frozen=True, slots=True)
class ProbeDue:
    """Timer: a worker that was put out may be tried again. `turn` counts the times."""

    worker_id: str
    turn: int


@dataclass(frozen=True, slots=True)
class StageQuantiles:
    """What the slow ones of a worker's stages take, by its spans."""

    worker_id: str
    model: str
    prefill: float
    """Times what is expected."""
    gap_s: float
    """Between two outputs of a stream."""


@dataclass(frozen=True, slots=True)
class GatewayGraceOver:
    """Timer: a gateway that lost its stream had time to come back."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class WorkerSettled:
    """Timer: gateways had time to claim what a worker reported as running. `attachment` counts its streams."""

    worker_id: str
    attachment: int


@dataclass(frozen=True, slots=True)
class Settled:
    """Timer: after the election, gateways and workers had time to come."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """Timer, periodic: look for requests and models that no worker is left for."""


@dataclass(frozen=True, slots=True)
class PromisesListed:
    """Allocations and assignments as they stand; others are gone."""

    allocations: tuple[fleet_pb2.Allocation, ...]
    assignments: tuple[registry_pb2.AssignmentRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class PromiseChanged:
    """An allocation was made, changed, or taken back (None)."""

    name: str
    allocation: fleet_pb2.Allocation | None
    revision: int = 0
    """Of etcd, at which that was so; older news than what is known is ignored. 0: whatever is known."""


@dataclass(frozen=True, slots=True)
class Rebalance:
    """Timer, periodic: see that promises are kept."""


Event = (
    Tick
    | TermRaised
    | WorkerRegistered
    | WorkerDeregistered
    | MembersListed
    | WorkerAttached
    | WorkerFrame
    | WorkerDetached
    | GatewayConnected
    | GatewayLost
    | Submitted
    | TakeUpAsked
    | FollowerJoined
    | FollowerLeft
    | JournalInherited
    | Cancelled
    | Killed
    | Reprioritized
    | ServiceInherited
    | DrainOrdered
    | DrainDue
    | ChoiceFinished
    | DeadlinePassed
    | RetryDue
    | AttemptStalled
    | AttemptLate
    | WorkerSlow
    | ProbeDue
    | StageQuantiles
    | GatewayGraceOver
    | WorkerSettled
    | Settled
    | Sweep
    | PromisesListed
    | PromiseChanged
    | Rebalance
)
