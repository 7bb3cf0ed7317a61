"""Prefix hashes: equal for equal prefixes, unrelated for anything else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.prepare import Prompt, fleet_request
from gateway.text.prefix import BLOCK_TOKENS, prefix_hashes
from gateway.types import GenerationRequest, Identity, Params
from llmos.internal.v1 import requests_pb2

TOKENS = list(range(3 * BLOCK_TOKENS + 5))
BASE = {"model_version": "v1", "tenant": "a", "adapter": "", "salt": b"s"}


def test_one_hash_of_64_bits_per_full_block() -> None:
    hashes = prefix_hashes(TOKENS, **BASE)  # type: ignore[arg-type]
    assert len(set(hashes)) == 3
    assert all(0 <= value < 1 << 64 for value in hashes)
    assert prefix_hashes(TOKENS[: BLOCK_TOKENS - 1], **BASE) == []  # type: ignore[arg-type]


@given(st.integers(0, len(TOKENS) - 1))
def test_a_changed_token_changes_its_block_and_all_later_ones(place: int) -> None:
    changed = [*TOKENS]
    changed[place] += 1
    before, after = prefix_hashes(TOKENS, **BASE), prefix_hashes(changed, **BASE)  # type: ignore[arg-type]
    block = place // BLOCK_TOKENS
    assert before[:block] == after[:block]
    assert all(left != right for left, right in zip(before[block:], after[block:], strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {"tenant": "b"},
        {"model_version": "v2"},
        {"adapter": "x"},
        {"salt": b"t"},
        {"tenant": "v1", "model_version": "a"},
    ],
)
def test_nothing_is_shared_beyond_tenant_version_adapter_and_deployment(change: dict[str, object]) -> None:
    other = prefix_hashes(TOKENS, **(BASE | change))  # type: ignore[arg-type]
    assert not set(other) & set(prefix_hashes(TOKENS, **BASE))  # type: ignore[arg-type]


def sent(tenant: str = "a", version: str = "v1", adapter: str = "", salt: bytes = b"s") -> set[int]:
    """Hashes that a request goes out with."""
    asked = GenerationRequest("completion", "m", Params(max_tokens=1), token_ids=tuple(TOKENS))
    base = requests_pb2.CatalogueModel(name="m", version=version)
    model = requests_pb2.CatalogueModel(name="tone", version=adapter, base_model="m") if adapter else base
    fields = {"inner_id": "r", "seed": 1, "max_tokens": 1, "salt": salt}
    request = fleet_request(asked, Identity(tenant), model, base, Prompt(TOKENS), **fields)  # type: ignore[arg-type]
    return set(request.prefix_hashes)


def test_what_a_request_is_sent_with_shares_nothing_with_other_tenants_versions_adapters_and_deployments() -> None:
    others = [sent(tenant="b"), sent(version="v2"), sent(adapter="t1"), sent(adapter="t2"), sent(salt=b"t")]
    assert sent() == set(prefix_hashes(TOKENS, **BASE))  # type: ignore[arg-type]
    assert len(set.union(sent(), *others)) == 3 * 6


def test_hashes_do_not_change_between_releases() -> None:
    # Gateways of two releases serve one fleet during a rollout.
    assert prefix_hashes(TOKENS[:64], model_version="v1", tenant="a", salt=b"s") == [11290785159910899755]
