"""What a request asks for and what its key allows: class, weight, limits."""

from __future__ import annotations

from typing import Literal

import pytest

from gateway import validate
from gateway.prepare import Prompt, fleet_request
from gateway.tiers import granted
from gateway.types import GenerationRequest, Identity, Params
from llmos.errors import InvalidRequest, Overloaded, PromptTooLong, Unavailable
from llmos.internal.v1 import request_pb2, requests_pb2
from llmos.rpc import trailing_metadata
from llmos.tenants import TenantLimits

Class = Literal["interactive", "standard", "batch"]


@pytest.mark.parametrize(
    ("ceiling", "asked", "got"),
    [
        ("standard", None, "standard"),
        ("standard", "interactive", "standard"),
        ("standard", "batch", "batch"),
        ("interactive", "standard", "standard"),
        ("batch", "interactive", "batch"),
    ],
)
def test_a_keys_class_is_the_ceiling(ceiling: Class, asked: Class | None, got: Class) -> None:
    assert granted(ceiling, asked) == got


def submitted(identity: Identity, priority: Class | None = None) -> request_pb2.Request:
    model = requests_pb2.CatalogueModel(name="m", version="v")
    request = GenerationRequest("completion", "m", Params(), text="a", priority=priority)
    return fleet_request(request, identity, model, model, Prompt((1, 2)), inner_id="r", seed=1, max_tokens=4, salt=b"")


def test_the_fleet_learns_weight_limits_and_class() -> None:
    wire = submitted(Identity("t", priority="interactive", limits=TenantLimits(4, 8, 1000)), "batch")
    assert (wire.tenant_weight, wire.quota.max_requests, wire.quota.tokens_per_minute) == (4, 8, 1000)
    assert wire.priority == request_pb2.PRIORITY_CLASS_BATCH
    plain = submitted(Identity("t"))
    assert plain.tenant_weight == 1
    assert not plain.HasField("quota")
    assert plain.priority == request_pb2.PRIORITY_CLASS_STANDARD


def test_an_unknown_tier_is_refused() -> None:
    body = {"model": "m", "prompt": "a", "service_tier": "gold"}
    with pytest.raises(InvalidRequest) as caught:
        validate.completion_request(body)
    assert caught.value.param == "service_tier"


def test_trailers_say_whether_and_when_to_retry() -> None:
    busy = dict(trailing_metadata(Overloaded("full", retry_after_s=2.5)))
    assert (busy["x-should-retry"], busy["retry-after"]) == ("true", "2.500")
    away = dict(trailing_metadata(Unavailable("away")))
    assert (away["x-should-retry"], away["retry-after"]) == ("true", "1.000")
    wrong = dict(trailing_metadata(PromptTooLong("long")))
    assert wrong["x-should-retry"] == "false"
    assert "retry-after" not in wrong
