"""Vectors, labels and scores over HTTP: shapes, many texts at a time, and the end of all when one fails."""

from __future__ import annotations

import asyncio
import base64
import struct

import httpx
import pytest

from gateway.tasks import AT_A_TIME
from gateway.types import ModelInfo
from llmos.errors import Overloaded
from tests.fakes.engine import CREATED, MODEL, Asked, Script
from tests.integration.gateway_http.conftest import Running, Serve

VECTORS = ModelInfo("vectors", "v1", 64, frozenset({"embed"}), CREATED, dimensions=(3, 2))
CLASSIFIER = ModelInfo("classes", "v1", 64, frozenset({"classify"}), CREATED, labels=("bad", "good"))
RANKER = ModelInfo("ranker", "v1", 64, frozenset({"score"}), CREATED, labels=("relevant",))
Json = dict[str, str]
SERVED = (MODEL, VECTORS, CLASSIFIER, RANKER)


def of_length(request: Asked) -> Script:
    """Values that tell texts apart: by their lengths."""
    size = float(len(request.text or request.token_ids or "") + 10 * len(getattr(request, "second", None) or ""))
    values = {"embed": (size, 4.0, 1.0), "classify": (0.25, 0.75), "score": (size,)}
    return Script(pieces=(), values=values.get(request.kind, ()))


async def post(server: Running, path: str, **body: object) -> httpx.Response:
    return await server.http.post(path, json=body)


async def test_embeddings_in_both_formats(serve: Serve) -> None:
    server = await serve(of_length, served=SERVED)
    floats = await server.client.embeddings.create(model="vectors", input=["a", "bc"], encoding_format="float")
    assert [(entry.index, entry.embedding) for entry in floats.data] == [(0, [1.0, 4.0, 1.0]), (1, [2.0, 4.0, 1.0])]
    assert (floats.model, floats.usage.prompt_tokens, floats.usage.total_tokens) == ("vectors", 10, 10)
    # What the client asks for by itself is base64, which its own types do not have.
    packed = await server.lenient.embeddings.create(model="vectors", input=["a", "bc"])
    assert [list(entry.embedding) for entry in packed.data] == [entry.embedding for entry in floats.data]
    raw = (await post(server, "/v1/embeddings", model="vectors", input="a", encoding_format="base64")).json()
    assert struct.unpack("<3f", base64.b64decode(raw["data"][0]["embedding"])) == (1.0, 4.0, 1.0)


async def test_token_ids_are_taken_as_they_are(serve: Serve) -> None:
    server = await serve(of_length, served=SERVED)
    answer = await server.client.embeddings.create(model="vectors", input=[5, 6], encoding_format="float")
    assert len(answer.data) == 1
    assert [generation.request.token_ids for generation in server.engine.generations] == [(5, 6)]


async def test_fewer_dimensions_only_where_the_model_was_trained_for_them(serve: Serve) -> None:
    server = await serve(of_length, served=SERVED)
    answer = await post(server, "/v1/embeddings", model="vectors", input="abc", dimensions=2)
    assert answer.json()["data"][0]["embedding"] == pytest.approx([0.6, 0.8])
    refused = await post(server, "/v1/embeddings", model="vectors", input="abc", dimensions=1)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "dimensions")


async def test_labels(serve: Serve) -> None:
    server = await serve(of_length, served=SERVED)
    answer = (await post(server, "/v1/classify", model="classes", input=["a"])).json()
    assert answer["data"] == [{"index": 0, "label": "good", "probs": [0.25, 0.75], "num_classes": 2}]
    assert (answer["object"], answer["model"], answer["usage"]["total_tokens"]) == ("list", "classes", 5)


async def test_scores_and_order_by_a_cross_encoder(serve: Serve) -> None:
    server = await serve(of_length, served=SERVED)
    scored = (await post(server, "/v1/score", model="ranker", text_1="q", text_2=["a", "bcd", "ef"])).json()
    assert [entry["score"] for entry in scored["data"]] == [11.0, 31.0, 21.0]
    for path in ("/v1/rerank", "/rerank"):
        body = {"model": "ranker", "query": "q", "documents": ["a", {"text": "bcd"}, "ef"], "top_n": 2}
        ranked = (await post(server, path, **body)).json()
        assert ranked["results"] == [
            {"index": 1, "relevance_score": 31.0, "document": {"text": "bcd"}},
            {"index": 2, "relevance_score": 21.0, "document": {"text": "ef"}},
        ]
        bare = (await post(server, path, **body, return_documents=False)).json()
        assert set(bare["results"][0]) == {"index", "relevance_score"}


async def test_scores_by_vectors_ask_for_each_text_once(serve: Serve) -> None:
    server = await serve(of_length, served=SERVED)
    answer = (await post(server, "/v1/score", model="vectors", text_1="ab", text_2=["ab", "abcdefgh", "ab"])).json()
    scores = [entry["score"] for entry in answer["data"]]
    assert scores[0] == scores[2] == pytest.approx(1.0)
    assert scores[1] == pytest.approx((2 * 8 + 17) / (21 * 81) ** 0.5)
    assert len(server.engine.generations) == 2


@pytest.mark.parametrize(
    ("path", "model", "body"),
    [
        ("/v1/embeddings", "classes", {"input": "a"}),
        ("/v1/embeddings", "tiny", {"input": "a"}),
        ("/v1/classify", "ranker", {"input": "a"}),
        ("/v1/score", "classes", {"text_1": "a", "text_2": "b"}),
        ("/v1/rerank", "tiny", {"query": "a", "documents": ["b"]}),
    ],
)
async def test_a_model_is_asked_only_for_what_it_does(
    serve: Serve, path: str, model: str, body: dict[str, str]
) -> None:
    server = await serve(of_length, served=SERVED)
    answer = await post(server, path, model=model, **body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_feature")
    missing = await post(server, path, model="nope", **body)
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    assert not server.engine.generations


async def test_many_texts_run_a_bounded_number_at_a_time(serve: Serve) -> None:
    gate = asyncio.Event()
    server = await serve(lambda request: Script((), values=(1.0, 2.0, 2.0), hold_start=gate), served=SERVED)
    texts = [str(number) for number in range(AT_A_TIME + 9)]
    asked = asyncio.create_task(
        server.client.embeddings.create(
            model="vectors", input=texts, encoding_format="float", extra_headers={"x-request-id": "mine"}
        )
    )
    await server.engine.wait_for(AT_A_TIME)
    assert len(server.engine.generations) == AT_A_TIME
    gate.set()
    answer = await asked
    assert len(answer.data) == len(texts)
    assert sorted(server.engine.request_ids) == sorted(f"mine-{number}" for number in range(len(texts)))
    assert all(generation.closed.is_set() for generation in server.engine.generations)


async def test_one_failure_ends_all(serve: Serve) -> None:
    never = asyncio.Event()

    def script(request: Asked) -> Script:
        if request.text == "bad":
            return Script((), fail=Overloaded("full", retry_after_s=2.0), fail_before_output=True)
        return Script((), hold_start=never)

    server = await serve(script, served=SERVED)
    answer = await post(server, "/v1/embeddings", model="vectors", input=["good", "bad", "good"])
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
    assert answer.headers["retry-after"] == "2"
    assert all(generation.closed.is_set() for generation in server.engine.generations)


async def test_a_deadline_holds_for_all_texts_together(serve: Serve) -> None:
    server = await serve(Script((), hold_start=asyncio.Event()), served=SERVED)
    headers = {"x-request-timeout": "0.05"}
    body = {"model": "vectors", "input": ["a", "b"]}
    answer = await server.http.post("/v1/embeddings", json=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert all(generation.closed.is_set() for generation in server.engine.generations)


async def test_a_client_that_goes_away_takes_its_texts_with_it(serve: Serve) -> None:
    server = await serve(Script((), hold_start=asyncio.Event()), served=SERVED)
    asked = asyncio.create_task(post(server, "/v1/embeddings", model="vectors", input=["a", "b", "c"]))
    await server.engine.wait_for(3)
    asked.cancel()
    for generation in server.engine.generations:
        await asyncio.wait_for(generation.closed.wait(), 10)


async def test_what_models_are_for_is_listed(serve: Serve) -> None:
    server = await serve(of_length, served=SERVED)
    listed = {model["id"]: model for model in (await server.http.get("/v1/models")).json()["data"]}
    assert listed["vectors"]["dimensions"] == [3, 2]
    assert listed["classes"]["labels"] == ["bad", "good"]
    assert "labels" not in listed["tiny"]
