"""Request ids, and what a gateway still has to say."""

from __future__ import annotations

import random

import pytest

from gateway import request_id
from gateway.outbox import Outbox
from llmos.internal.v1 import requests_pb2


@pytest.mark.parametrize(
    ("client_id", "acceptable"),
    [("a", True), ("x" * 128, True), ("", False), ("x" * 129, False), ("é", False), ("a\n", False)],
)
def test_what_a_client_may_name_its_request(client_id: str, acceptable: bool) -> None:
    assert request_id.is_acceptable(client_id) is acceptable


def test_two_tenants_never_share_a_name() -> None:
    assert len({request_id.inside(*pair) for pair in [("c", "a/b"), ("b/c", "a"), ("c", "a%2Fb")]}) == 3


def test_a_resumed_request_is_still_known_by_its_first_name() -> None:
    rng = random.Random(1)
    inner = request_id.inside("mine", "t")
    once = request_id.again(inner, rng)
    twice = request_id.again(once, rng)
    assert len({inner, once, twice}) == 3
    for name in (inner, once, twice):
        assert request_id.names("mine", name, "t")
        assert request_id.names(name, name, "t")
        assert not request_id.names("mine", name, "u")
        assert not request_id.names("other", name, "t")


def test_generated_ids_are_the_same_inside() -> None:
    name = request_id.generate(random.Random(1))
    assert request_id.is_acceptable(name)
    assert request_id.names(name, request_id.again(name, random.Random(2)), "t")


def cancel(name: str) -> requests_pb2.ExchangeRequest:
    return requests_pb2.ExchangeRequest(cancel=requests_pb2.Cancel(request_id=name))


def test_a_flood_of_acknowledgements_holds_no_message_up() -> None:
    box = Outbox(4)
    box.push(cancel("a"))
    box.push(cancel("b"))
    kinds = []
    for sequence in range(1, 6):
        box.acknowledge(sequence)
        message = box.pop()
        assert message is not None
        kinds.append(message.WhichOneof("message"))
    assert kinds == ["ack", "cancel", "ack", "cancel", "ack"]


def test_acknowledgements_fold_into_one_and_go_first() -> None:
    box = Outbox(8)
    box.push(cancel("a"))
    box.acknowledge(3)
    box.acknowledge(5)
    box.acknowledge(4)
    first, second = box.pop(), box.pop()
    assert first is not None
    assert first.ack.sequence == 5
    assert second == cancel("a")
    assert box.pop() is None


def test_a_full_box_takes_nothing() -> None:
    box = Outbox(2)
    assert [box.push(cancel(str(number))) for number in range(3)] == [True, True, False]


def test_only_cancellations_outlive_the_stream() -> None:
    box = Outbox(4)
    box.push(requests_pb2.ExchangeRequest(finish=requests_pb2.Finish(request_id="f")))
    box.push(cancel("a"))
    box.acknowledge(1)
    box.reset()
    assert box.pop() == cancel("a")
    assert box.pop() is None
