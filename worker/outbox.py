"""Output on its way to the scheduler: merged while it cannot go, kept until it is acknowledged. Pure; one owner.

At most `window` frames with content are unacknowledged. Beyond that, pieces of a choice are merged in place, so memory
is bounded by what the running attempts may produce and nothing is lost. A new stream gets what the old one did not
acknowledge, first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from llmos.internal.v1 import request_pb2, work_pb2
from llmos.v1 import inference_pb2
from worker.backend import Epoch
from worker.wire import epoch_from_wire

WINDOW = 64
FRAME_BYTES = 4 * 1024 * 1024
"""Well below the largest message that a peer accepts."""
PIECE_TOKENS = 1024


class Outbox:
    """Pieces of output and failures, in order per choice; a failure goes after the pieces of its attempt."""

    def __init__(self, *, window: int = WINDOW, frame_bytes: int = FRAME_BYTES) -> None:
        self._window = window
        self._frame_bytes = frame_bytes
        self._pieces: dict[str, dict[int, list[request_pb2.Output]]] = {}
        self._failures: list[request_pb2.Failure] = []
        self._whole: work_pb2.WorkFrame | None = None
        """The engine's frame, to be passed on as it is; there are no pieces beside it."""
        self._unacknowledged: deque[work_pb2.WorkFrame] = deque()
        self._sequence = 0

    @property
    def empty(self) -> bool:
        """Everything is sent and acknowledged."""
        return not (self._whole or self._pieces or self._failures or self._unacknowledged)

    @property
    def sendable(self) -> bool:
        """There is something to send, and the window is open."""
        return bool(self._whole or self._pieces or self._failures) and self._open

    def add_frame(self, frame: work_pb2.WorkFrame, taken: Sequence[request_pb2.Output]) -> None:
        """Append those pieces of an engine's frame that were `taken`. If that is all of them, most often the message
        itself goes on, and they are not touched again; what else it says is dropped. The outbox owns it."""
        waits = self._whole is not None or self._pieces or not self._open
        if taken and not waits and len(taken) == len(frame.outputs):
            frame.ClearField("models")
            frame.ClearField("spans")
            frame.ClearField("cache")
            frame.ClearField("failures")
            if frame.ByteSize() <= self._frame_bytes:
                self._whole = frame
                return
        for output in taken:
            self.add(output)

    @property
    def _open(self) -> bool:
        return len(self._unacknowledged) < self._window

    def add(self, output: request_pb2.Output) -> None:
        """Append a piece. The outbox owns the message from here on."""
        self._break_up()
        pieces = self._pieces.setdefault(output.request_id, {}).setdefault(output.choice, [])
        if pieces and _continues(pieces[-1], output):
            _merge(pieces[-1], output)
        else:
            pieces.append(output)

    def add_failure(self, failure: request_pb2.Failure) -> None:
        """Append a failure."""
        self._failures.append(failure)

    def drop(self, request_id: str, epoch: Epoch) -> None:
        """Forget unsent pieces of a request's attempts up to `epoch`: they were cancelled or replaced."""
        self._break_up()
        kept = [piece for piece in self._of(request_id) if epoch_from_wire(piece.epoch).after(epoch)]
        self._pieces.pop(request_id, None)
        for piece in kept:
            self.add(piece)

    def attempts(self) -> set[tuple[str, Epoch]]:
        """Attempts with pieces that no scheduler has acknowledged."""
        self._break_up()
        pieces = [piece for request_id in self._pieces for piece in self._of(request_id)]
        for frame in self._unacknowledged:
            pieces.extend(frame.outputs)
        return {(piece.request_id, epoch_from_wire(piece.epoch)) for piece in pieces}

    def attach(self, wanted: Callable[[str, Epoch], bool]) -> None:
        """A new stream begins: count its frames from 1; unacknowledged pieces that are still wanted go first."""
        self._break_up()
        newer = [piece for request_id in self._pieces for piece in self._of(request_id)]
        failures = self._failures
        self._pieces, self._failures, self._sequence = {}, [], 0
        for frame in self._unacknowledged:
            for output in frame.outputs:
                if wanted(output.request_id, epoch_from_wire(output.epoch)):
                    self.add(output)
            self._failures.extend(frame.failures)
        self._unacknowledged.clear()
        self._failures.extend(failures)
        for piece in newer:
            self.add(piece)

    def acknowledge(self, sequence: int) -> None:
        """The scheduler has all frames up to `sequence`."""
        while self._unacknowledged and self._unacknowledged[0].sequence <= sequence:
            self._unacknowledged.popleft()

    def take(self) -> work_pb2.WorkFrame:
        """The next frame; without content if nothing is to be sent or the window is closed.

        The caller may add state and spans to it; those are not sent again.
        """
        self._sequence += 1
        if not self.sendable:
            return work_pb2.WorkFrame(sequence=self._sequence)
        frame, self._whole = self._whole or work_pb2.WorkFrame(), None
        frame.sequence = self._sequence
        self._fill(frame)
        self._unacknowledged.append(frame)
        return frame

    def _break_up(self) -> None:
        """Turn the engine's frame into pieces, because it cannot leave as it is."""
        frame, self._whole = self._whole, None
        if frame is not None:
            for output in frame.outputs:
                self.add(output)

    def _fill(self, frame: work_pb2.WorkFrame) -> None:
        left = self._frame_bytes
        while self._pieces and left > 0:
            request_id, choices = next(iter(self._pieces.items()))
            choice, pieces = next(iter(choices.items()))
            piece = pieces.pop(0)
            left -= piece.ByteSize()
            frame.outputs.append(piece)
            if not pieces:
                del choices[choice]
            if not choices:
                del self._pieces[request_id]
        if not self._pieces:
            frame.failures.extend(self._failures)
            self._failures.clear()

    def _of(self, request_id: str) -> list[request_pb2.Output]:
        return [piece for pieces in self._pieces.get(request_id, {}).values() for piece in pieces]


def _continues(piece: request_pb2.Output, following: request_pb2.Output) -> bool:
    return (
        piece.epoch == following.epoch
        and piece.index + len(piece.token_ids) == following.index
        and piece.finish_reason == inference_pb2.FINISH_REASON_UNSPECIFIED
        and len(piece.token_ids) < PIECE_TOKENS
        and not piece.text
        and not following.text
    )


def _merge(piece: request_pb2.Output, following: request_pb2.Output) -> None:
    piece.token_ids.extend(following.token_ids)
    piece.logprobs.extend(following.logprobs)
    piece.finish_reason = following.finish_reason
