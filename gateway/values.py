"""What a request for values has produced: nothing, or all of it in one output. Pure.

Stands in a stream where a generation has its `Transcript`.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

from gateway.transcript import Taken, Verdict
from gateway.types import Delta, Progress
from llmos.internal.v1 import request_pb2
from llmos.v1 import inference_pb2


class ValuesTranscript:
    """Owned by one stream. `count` is the number of values that must come; 0: at least one."""

    completion_tokens = 0
    cached_tokens = 0

    def __init__(self, count: int) -> None:
        self._count = count
        self.epoch = (0, 0)
        """Highest `(term, attempt)` seen."""
        self.finished = False

    def resume(self, progress: Sequence[Progress]) -> list[Delta]:
        """A client holds all or nothing."""
        return []

    def resume_state(self) -> list[request_pb2.ChoiceResume]:
        """What a scheduler must know to compute the values, again or at last: nothing."""
        return []

    def take(self, output: request_pb2.Output) -> Taken:
        """Take the output with the values, once."""
        epoch = (output.epoch.term, output.epoch.attempt)
        if epoch < self.epoch:
            return Taken(Verdict.STALE)
        if not self._is_sound(output):
            return Taken(Verdict.CORRUPT)
        if self.finished:
            return Taken(Verdict.DUPLICATE)
        self.epoch = epoch
        self.finished = True
        return Taken(Verdict.TAKEN, Delta(0, 0, "", (), finish="stop", values=array("f", output.values)))

    def _is_sound(self, output: request_pb2.Output) -> bool:
        count = len(output.values)
        return (
            count == (self._count or max(1, count))
            and (output.choice, output.index, len(output.token_ids)) == (0, 0, 0)
            and output.finish_reason == inference_pb2.FINISH_REASON_STOP
            and all(map(math.isfinite, output.values))
        )
