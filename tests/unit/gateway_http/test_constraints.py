"""The fields that say what an output must look like: one at most, each within its bounds, the same over gRPC."""

from __future__ import annotations

import json

import pytest

from gateway.constraints import MAX_BYTES
from gateway.failure import for_client
from gateway.grpc_convert import chat_body, completion_body
from gateway.prepare import Prompt, fleet_request
from gateway.types import Constraint, Identity
from gateway.validate import chat_request, completion_request
from llmos.errors import InvalidConstraint, InvalidRequest, LlmosError, UnsupportedFeature
from llmos.internal.v1 import request_pb2, requests_pb2
from llmos.v1 import inference_pb2 as pb

HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}
TEXT = json.dumps(SCHEMA, separators=(",", ":"))


def chat(**fields: object) -> dict[str, object]:
    return {"model": "tiny", "messages": HELLO, **fields}


def response_format(schema: object, **more: object) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **more}}


def nested(depth: int) -> object:
    return {"items": nested(depth - 1)} if depth > 1 else {}


GOOD: list[tuple[dict[str, object], Constraint | None]] = [
    ({"response_format": None}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, Constraint("json_object", "response_format")),
    (
        {"response_format": response_format(SCHEMA, strict=True, description="d")},
        Constraint("json_schema", "response_format.json_schema.schema", TEXT),
    ),
    ({"structured_outputs": {"json": SCHEMA}}, Constraint("json_schema", "structured_outputs.json", TEXT)),
    ({"structured_outputs": {"json": " {} "}}, Constraint("json_schema", "structured_outputs.json", " {} ")),
    ({"structured_outputs": {"json_object": True}}, Constraint("json_object", "structured_outputs.json_object")),
    ({"structured_outputs": {"regex": "a+"}}, Constraint("regex", "structured_outputs.regex", "a+")),
    ({"structured_outputs": {"choice": ["a", "b"]}}, Constraint("choice", "structured_outputs.choice", "", ("a", "b"))),
    ({"guided_json": SCHEMA}, Constraint("json_schema", "guided_json", TEXT)),
    ({"guided_json": TEXT, "guided_regex": None}, Constraint("json_schema", "guided_json", TEXT)),
    ({"guided_regex": "x" * MAX_BYTES}, Constraint("regex", "guided_regex", "x" * MAX_BYTES)),
    ({"guided_choice": ["a"] * 1024}, Constraint("choice", "guided_choice", "", ("a",) * 1024)),
    (
        {"guided_json": nested(64)},
        Constraint("json_schema", "guided_json", json.dumps(nested(64), separators=(",", ":"))),
    ),
]


@pytest.mark.parametrize(("fields", "expected"), GOOD)
def test_each_field_arrives(fields: dict[str, object], expected: Constraint | None) -> None:
    assert chat_request(chat(**fields)).params.constraint == expected
    assert completion_request({"model": "tiny", "prompt": "x", **fields}).params.constraint == expected


FORMAT = "response_format.json_schema"
BAD: list[tuple[dict[str, object], type[LlmosError], str]] = [
    ({"response_format": "json"}, InvalidRequest, "response_format"),
    ({"response_format": {}}, InvalidRequest, "response_format.type"),
    ({"response_format": {"type": 3}}, InvalidRequest, "response_format.type"),
    ({"response_format": {"type": "xml"}}, UnsupportedFeature, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, InvalidRequest, FORMAT),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, InvalidRequest, f"{FORMAT}.schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, InvalidRequest, f"{FORMAT}.name"),
    ({"response_format": response_format({}, name="a b")}, InvalidRequest, f"{FORMAT}.name"),
    ({"response_format": response_format("{}")}, InvalidRequest, f"{FORMAT}.schema"),
    ({"response_format": response_format({}, shcema={})}, InvalidRequest, FORMAT),
    ({"structured_outputs": {}}, InvalidRequest, "structured_outputs"),
    ({"structured_outputs": {"json_object": False}}, InvalidRequest, "structured_outputs"),
    ({"structured_outputs": {"grammar": "x"}}, InvalidRequest, "structured_outputs"),
    ({"structured_outputs": {"regex": ""}}, InvalidRequest, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, InvalidRequest, "structured_outputs.choice"),
    ({"guided_json": "{"}, InvalidRequest, "guided_json"),
    ({"guided_json": "[" * 5000}, InvalidRequest, "guided_json"),
    ({"guided_json": "[]"}, InvalidRequest, "guided_json"),
    ({"guided_json": "true"}, InvalidRequest, "guided_json"),
    ({"guided_json": nested(65)}, InvalidRequest, "guided_json"),
    ({"guided_json": {"title": "ä" * (MAX_BYTES // 2)}}, InvalidRequest, "guided_json"),
    ({"guided_regex": "ä" * (MAX_BYTES // 2 + 1)}, InvalidRequest, "guided_regex"),
    ({"guided_choice": []}, InvalidRequest, "guided_choice"),
    ({"guided_choice": ["a", ""]}, InvalidRequest, "guided_choice"),
    ({"guided_choice": ["a", 1]}, InvalidRequest, "guided_choice[1]"),
    ({"guided_choice": ["a"] * 1025}, InvalidRequest, "guided_choice"),
    ({"guided_choice": ["a" * 1000] * 100}, InvalidRequest, "guided_choice"),
    ({"guided_json": {}, "guided_regex": "a"}, InvalidRequest, "guided_regex"),
    ({"response_format": {"type": "json_object"}, "guided_json": {}}, InvalidRequest, "guided_json"),
]


@pytest.mark.parametrize(("fields", "kind", "param"), BAD)
def test_what_is_wrong_is_refused_by_name(fields: dict[str, object], kind: type[LlmosError], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat_request(chat(**fields))
    assert (type(caught.value), caught.value.param) == (kind, param)


GRPC: list[tuple[pb.Constraint, tuple[str, str, tuple[str, ...]]]] = [
    (pb.Constraint(json_schema=TEXT), ("json_schema", TEXT, ())),
    (pb.Constraint(json_object=True), ("json_object", "", ())),
    (pb.Constraint(regex="a+"), ("regex", "a+", ())),
    (pb.Constraint(choice=pb.ConstraintChoices(texts=["a", "b"])), ("choice", "", ("a", "b"))),
]


@pytest.mark.parametrize(("message", "expected"), GRPC)
def test_what_comes_over_grpc_goes_to_the_fleet_as_it_came(
    message: pb.Constraint, expected: tuple[str, str, tuple[str, ...]]
) -> None:
    params = pb.GenerationParams(constraint=message)
    asked = chat_request(
        chat_body(pb.ChatRequest(model="m", messages=[pb.Message(role=2, content="x")], params=params))
    )
    same = completion_request(completion_body(pb.CompleteRequest(model="m", text="x", params=params)))
    found = asked.params.constraint
    assert found is not None and (found.kind, found.text, found.texts) == expected
    assert same.params.constraint == found
    model = requests_pb2.CatalogueModel(name="m", version="1")
    sent = fleet_request(asked, Identity("t"), model, model, Prompt([1]), inner_id="r", seed=1, max_tokens=1, salt=b"")
    assert sent.constraint == message


@pytest.mark.parametrize("message", [pb.Constraint(), pb.Constraint(json_object=False), pb.Constraint(regex="")])
def test_an_empty_constraint_over_grpc_is_refused(message: pb.Constraint) -> None:
    request = pb.CompleteRequest(model="m", text="x", params=pb.GenerationParams(constraint=message))
    with pytest.raises(InvalidRequest):
        completion_request(completion_body(request))


def test_a_refusal_by_a_worker_names_what_the_client_wrote() -> None:
    failure = request_pb2.Failure(code="invalid_constraint", message="no", param="constraint")
    error = for_client(failure, "guided_regex")
    assert isinstance(error, InvalidConstraint) and error.param == "guided_regex"
    failure.param = "max_tokens"
    assert for_client(failure, "guided_regex").param == "max_tokens"
