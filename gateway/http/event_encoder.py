"""Deltas to the bytes of server-sent events: one event per token that brings text, however the tokens came.

All chunks of a choice have the same bytes around their text; those are made once. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import msgspec

from gateway.http.shapes import ChoiceProgress, Shape
from gateway.http.sse import event
from gateway.types import Delta

_MARK = "\0"
_ENCODED_MARK = b'"\\u0000"'
_encode = msgspec.json.Encoder().encode


@dataclass(slots=True)
class _Frame:
    """What stands around the text of a choice, and how far the choice has come."""

    before: bytes
    after: bytes
    progress: ChoiceProgress


class EventEncoder:
    """Owned by one response, whose shape counts what the client has."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._frames: dict[int, _Frame] = {}
        self._has_others = shape.is_taken_up
        """The client may hold choices of which nothing has come here."""

    def encode(self, delta: Delta) -> bytes:
        """The events of a delta; empty if it brings nothing that a client sees, which the next event then counts."""
        frame = self._frames.get(delta.choice)
        opening = b"" if frame is not None else self._begin(delta.choice)
        frame = frame or self._frames[delta.choice]
        if delta.logprobs or delta.finish is not None or not 0 < len(delta.parts) == len(delta.token_ids):
            return opening + b"".join(map(self._whole, _singly(delta)))
        return opening + self._texts(delta, frame)

    def _begin(self, choice: int) -> bytes:
        """Take up a choice. Returns the event that opens it, if its shape has one."""
        shape = self._shape
        before, _, after = event(shape.text_chunk(choice, _MARK)).partition(_ENCODED_MARK)
        opening = shape.opening(choice) if shape.is_new(choice) else None
        self._frames[choice] = _Frame(before, after, shape.progress_of(choice))
        return b"" if opening is None else event(opening, shape.event_id())

    def _texts(self, delta: Delta, frame: _Frame) -> bytes:
        """Events of tokens without anything else."""
        progress = frame.progress
        events: list[bytes] = []
        for number, text in enumerate(delta.parts, start=delta.index + 1):
            progress.tokens = number
            if text:
                progress.chars += len(text)
                events.append(
                    b"%b%b%b%b" % (self._id(delta.choice, progress), frame.before, _encode(text), frame.after)
                )
        return events[0] if len(events) == 1 else b"".join(events)

    def _id(self, choice: int, progress: ChoiceProgress) -> bytes:
        if len(self._frames) == 1 and not self._has_others:
            return b"id: %d:%d:%d\n" % (choice, progress.tokens, progress.chars)
        return b"id: %b\n" % self._shape.event_id().encode()

    def _whole(self, delta: Delta) -> bytes:
        chunk = self._shape.chunk(delta)
        if delta.text or delta.logprobs or delta.finish:
            return event(chunk, self._shape.event_id())
        return b""


def _singly(delta: Delta) -> Iterator[Delta]:
    """A delta token by token; the last one brings what came with the end. One whose parts are not known stays whole."""
    count = len(delta.token_ids)
    if count < 2 or len(delta.parts) != count or (delta.logprobs and len(delta.logprobs) != count):
        yield delta
        return
    given = 0
    for at in range(count - 1):
        part = delta.parts[at]
        given += len(part)
        logprobs = delta.logprobs[at : at + 1]
        yield Delta(delta.choice, delta.index + at, part, delta.token_ids[at : at + 1], logprobs)
    yield replace(
        delta,
        index=delta.index + count - 1,
        text=delta.text[given:],
        token_ids=delta.token_ids[-1:],
        logprobs=delta.logprobs[-1:],
    )
