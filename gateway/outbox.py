"""What a gateway still has to say to its scheduler: bounded, in order, acknowledgements folded into one. Pure."""

from __future__ import annotations

from collections import deque

from llmos.internal.v1 import requests_pb2


class Outbox:
    """Owned by one link. Survives the stream: cancellations are kept for the next one, all else is said anew."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._messages: deque[requests_pb2.ExchangeRequest] = deque()
        self._acknowledge = 0
        self._acknowledged_last = False

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def full(self) -> bool:
        """Nothing more may be pushed until the stream takes something."""
        return len(self._messages) >= self._limit

    def push(self, message: requests_pb2.ExchangeRequest) -> bool:
        """Append a message; False if it is full and the message was not taken."""
        if self.full:
            return False
        self._messages.append(message)
        return True

    def acknowledge(self, sequence: int) -> None:
        """Say, with the next message, that all frames up to this one are here."""
        self._acknowledge = max(self._acknowledge, sequence)

    def pop(self) -> requests_pb2.ExchangeRequest | None:
        """The next message to write, or None. An acknowledgement goes first, as it frees the peer's memory.

        But no two in a row before a message: under a flood of frames a cancellation would wait for the end.
        """
        if self._acknowledge and not (self._acknowledged_last and self._messages):
            self._acknowledged_last = True
            sequence, self._acknowledge = self._acknowledge, 0
            return requests_pb2.ExchangeRequest(ack=requests_pb2.Ack(sequence=sequence))
        self._acknowledged_last = False
        return self._messages.popleft() if self._messages else None

    def reset(self) -> None:
        """The stream is lost. Cancellations stay, as nobody else would repeat them; the newest if they are many."""
        cancels = [message for message in self._messages if message.WhichOneof("message") == "cancel"]
        self._messages = deque(cancels[-self._limit // 2 :])
        self._acknowledge = 0
