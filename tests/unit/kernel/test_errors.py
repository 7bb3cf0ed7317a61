"""The error tree: every leaf survives the wire and carries a status."""

from __future__ import annotations

import grpc
import pytest

from llmos import errors


def tree(root: type[errors.LlmosError]) -> list[type[errors.LlmosError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in tree(child))]


LEAVES = [kind for kind in tree(errors.LlmosError) if not kind.__subclasses__()]


@pytest.mark.parametrize("kind", LEAVES)
def test_a_leaf_has_a_status_and_its_own_code(kind: type[errors.LlmosError]) -> None:
    assert kind.grpc_status is not grpc.StatusCode.OK
    assert 400 <= kind.http_status < 600
    assert [other for other in LEAVES if other.code == kind.code] == [kind]


@pytest.mark.parametrize("kind", [kind for kind in LEAVES if kind not in (errors.MissingExtra, errors.NotLeader)])
def test_from_code_rebuilds_the_leaf(kind: type[errors.LlmosError]) -> None:
    rebuilt = errors.from_code(kind.code, "why", param="field", retry_after_s=2.0)
    assert (type(rebuilt), rebuilt.message, rebuilt.param, rebuilt.retry_after_s) == (kind, "why", "field", 2.0)


def test_inner_nodes_with_a_code_rebuild_too() -> None:
    assert type(errors.from_code("invalid_request", "x")) is errors.InvalidRequest
    assert type(errors.from_code("not_found", "x")) is errors.NotFound
    assert type(errors.from_code("no such code", "x")) is errors.InternalError
    assert type(errors.from_code("not_leader", "x")) is errors.NotLeader


def test_a_missing_extra_says_what_to_install() -> None:
    assert "pip install 'llmos[worker]'" in errors.MissingExtra("worker", "Loading a model").message
