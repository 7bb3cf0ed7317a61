"""What goes to one gateway: output folded into frames, a window of unacknowledged ones, a bound in bytes. Pure."""

from __future__ import annotations

from llmos.internal.v1 import request_pb2, requests_pb2

WINDOW_FRAMES = 64
LIMIT_BYTES = 16 * 1024 * 1024
_FRAME_BYTES = 4 * 1024 * 1024
_FOLD_PIECES = 4096


class Outflow:
    """Owned by one stream. While the window is closed, pieces are folded per choice and wait."""

    def __init__(self, *, window: int = WINDOW_FRAMES, limit_bytes: int = LIMIT_BYTES) -> None:
        self._window = window
        self._limit_bytes = limit_bytes
        self._outputs: list[request_pb2.Output] = []
        self._failures: list[request_pb2.Failure] = []
        self._class_changes: dict[str, requests_pb2.ClassChange] = {}
        self._bytes = 0
        self._fold_at = _FOLD_PIECES
        self._sequence = 0
        self._acknowledged = 0

    @property
    def overflowing(self) -> bool:
        """The gateway has not taken its output for too long."""
        return self._bytes > self._limit_bytes

    @property
    def open(self) -> bool:
        """Another frame may be sent."""
        return self.unacknowledged < self._window

    @property
    def acknowledged(self) -> int:
        """Frames that have arrived."""
        return self._acknowledged

    @property
    def unacknowledged(self) -> int:
        """Frames on their way."""
        return self._sequence - self._acknowledged

    def add(self, output: request_pb2.Output) -> None:
        """Append a piece."""
        self._outputs.append(output)
        self._bytes += output.ByteSize()
        if len(self._outputs) >= self._fold_at or self._bytes > self._limit_bytes:
            self._fold()

    def add_failure(self, failure: request_pb2.Failure) -> None:
        """Append a request's end without a result; it follows the request's output in the same frame or a later one."""
        self._failures.append(failure)
        self._bytes += failure.ByteSize()

    def add_class_change(self, change: requests_pb2.ClassChange) -> None:
        """A request's class from now on; only the last one goes out."""
        if change.request_id not in self._class_changes:
            self._bytes += change.ByteSize()
        self._class_changes[change.request_id] = change

    def acknowledge(self, sequence: int) -> None:
        """All frames up to `sequence` are received. What was never sent cannot be acknowledged."""
        self._acknowledged = max(self._acknowledged, min(sequence, self._sequence))

    def take(self) -> requests_pb2.GatewayFrame | None:
        """The next frame; None if there is nothing to say or the window is closed."""
        if not (self._outputs or self._failures or self._class_changes) or not self.open:
            return None
        self._sequence += 1
        frame = requests_pb2.GatewayFrame(sequence=self._sequence)
        if self._bytes <= _FRAME_BYTES:
            frame.outputs.extend(self._outputs)
            self._outputs = []
        else:
            self._fill(frame)
        if not self._outputs:
            frame.failures.extend(self._failures)
            frame.class_changes.extend(self._class_changes.values())
            self._failures = []
            self._class_changes = {}
            self._bytes = 0
            self._fold_at = _FOLD_PIECES
        return frame

    def _fill(self, frame: requests_pb2.GatewayFrame) -> None:
        size = 0
        count = 0
        for output in self._outputs:
            if size >= _FRAME_BYTES:
                break
            size += output.ByteSize()
            count += 1
        frame.outputs.extend(self._outputs[:count])
        del self._outputs[:count]
        self._bytes -= size

    def _fold(self) -> None:
        """Merge pieces that continue one another; others stay as they are, in order per choice."""
        folded: list[request_pb2.Output] = []
        last: dict[tuple[str, int], int] = {}
        owned: set[int] = set()
        for output in self._outputs:
            key = (output.request_id, output.choice)
            at = last.get(key)
            if at is not None and _continues(folded[at], output):
                if at not in owned:
                    folded[at] = _copy(folded[at])
                    owned.add(at)
                _merge(folded[at], output)
            else:
                last[key] = len(folded)
                folded.append(output)
        self._outputs = folded
        rest = (*self._failures, *self._class_changes.values())
        self._bytes = sum(o.ByteSize() for o in folded) + sum(message.ByteSize() for message in rest)
        self._fold_at = max(_FOLD_PIECES, 2 * len(folded))


def _continues(piece: request_pb2.Output, following: request_pb2.Output) -> bool:
    return (
        not piece.finish_reason
        and not piece.text
        and not following.text
        and piece.index + len(piece.token_ids) == following.index
        and piece.epoch == following.epoch
    )


def _copy(output: request_pb2.Output) -> request_pb2.Output:
    copy = request_pb2.Output()
    copy.CopyFrom(output)
    return copy


def _merge(piece: request_pb2.Output, following: request_pb2.Output) -> None:
    piece.token_ids.extend(following.token_ids)
    piece.logprobs.extend(following.logprobs)
    piece.finish_reason = following.finish_reason
