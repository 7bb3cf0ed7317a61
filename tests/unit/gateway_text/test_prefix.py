"""Prefix hashes: equal for equal prefixes, unrelated for anything else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.text.prefix import BLOCK_TOKENS, prefix_hashes

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


def test_hashes_do_not_change_between_releases() -> None:
    # Gateways of two releases serve one fleet during a rollout.
    assert prefix_hashes(TOKENS[:64], model_version="v1", tenant="a", salt=b"s") == [11290785159910899755]
