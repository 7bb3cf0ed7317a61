"""No flipped bit of a sealed message passes, whichever it is; peers that do not seal are heard."""

from __future__ import annotations

import pytest

from llmos.errors import DamagedMessage
from llmos.internal.v1 import journal_pb2, requests_pb2, work_pb2
from llmos.sealed import Opener, sealing

FRAME = work_pb2.AttachResponse(frame=work_pb2.WorkFrame(sequence=3, step=9))
FRAME.frame.outputs.add(request_id="r1", choice=1, index=7, token_ids=[5, 125, 70_000])
PLAIN = FRAME.SerializeToString()
SEALED = sealing(work_pb2.AttachResponse.SerializeToString)(FRAME)


def opener() -> Opener:
    return Opener(work_pb2.AttachResponse.FromString)


def test_a_sealed_message_says_what_was_said() -> None:
    opened = opener()(SEALED)
    assert opened.frame == FRAME.frame
    assert opened.HasField("checksum")


def test_no_single_flipped_bit_passes() -> None:
    for bit in range(8 * len(SEALED)):
        damaged = bytearray(SEALED)
        damaged[bit // 8] ^= 1 << bit % 8
        reader = opener()
        reader(SEALED)
        with pytest.raises(DamagedMessage):
            reader(bytes(damaged))


@pytest.mark.parametrize("lost", range(1, len(SEALED)))
def test_no_cut_off_message_passes(lost: int) -> None:
    reader = opener()
    reader(SEALED)
    with pytest.raises(DamagedMessage):
        reader(SEALED[:-lost])


def test_a_peer_that_does_not_seal_is_heard() -> None:
    reader = opener()
    assert [reader(PLAIN).frame, reader(PLAIN).frame] == [FRAME.frame] * 2


def test_messages_without_the_field_pass_as_they_are() -> None:
    hello = work_pb2.SchedulerHello(scheduler_id="s")
    data = sealing(work_pb2.SchedulerHello.SerializeToString)(hello)
    assert data == hello.SerializeToString()
    assert Opener(work_pb2.SchedulerHello.FromString)(data) == hello


@pytest.mark.parametrize(
    "kind",
    [
        work_pb2.AttachRequest,
        work_pb2.AttachResponse,
        requests_pb2.ExchangeRequest,
        requests_pb2.ExchangeResponse,
        requests_pb2.TakeUpResponse,
        journal_pb2.FollowResponse,
    ],
)
def test_what_carries_tokens_is_sealed(kind: type) -> None:
    field = kind.DESCRIPTOR.fields_by_name["checksum"]  # type: ignore[attr-defined]
    assert (field.number, field.type) == (15, field.TYPE_FIXED32)
