"""The endpoints for vectors, labels and scores."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway import task_bodies, validate
from gateway.config import HttpLimits
from gateway.http.attend import attended
from gateway.http.body import read_json
from gateway.tasks import Call, Results, Tasks
from gateway.types import Authenticator, TraceHeaders

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TaskEndpoints:
    """Each method is one of them."""

    tasks: Tasks
    authenticator: Authenticator
    limits: HttpLimits

    async def embed(self, request: Request) -> Response:
        """POST /v1/embeddings, as OpenAI's"""
        call, body = await self._read(request)
        ask = task_bodies.embedding(body)
        results = await attended(self.tasks.embed(ask, call), request.receive)
        data = [
            {"object": "embedding", "index": index, "embedding": _encoded(row) if ask.base64 else list(row)}
            for index, row in enumerate(results.rows)
        ]
        return _answer(request, results, {"object": "list", "data": data})

    async def classify(self, request: Request) -> Response:
        """POST /v1/classify, as vLLM's"""
        call, body = await self._read(request)
        results = await attended(self.tasks.classify(task_bodies.classification(body), call), request.receive)
        data = [_classified(index, row, results.model.labels) for index, row in enumerate(results.rows)]
        return _answer(request, results, {**_head("classify", results), "data": data})

    async def score(self, request: Request) -> Response:
        """POST /v1/score, as vLLM's"""
        call, body = await self._read(request)
        results = await attended(self.tasks.score(task_bodies.score(body), call), request.receive)
        data = [{"object": "score", "index": index, "score": row[0]} for index, row in enumerate(results.rows)]
        return _answer(request, results, {**_head("score", results), "data": data})

    async def rerank(self, request: Request) -> Response:
        """POST /v1/rerank and /rerank, as Jina's and Cohere's"""
        call, body = await self._read(request)
        ask = task_bodies.rerank(body)
        results = await attended(self.tasks.score(ask.score, call), request.receive)
        scores = [row[0] for row in results.rows]
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[: ask.top_n]
        ranked: list[Json] = [{"index": index, "relevance_score": scores[index]} for index in order]
        if ask.return_documents:
            for entry in ranked:
                entry["document"] = {"text": ask.documents[entry["index"]]}
        return _answer(request, results, {"id": f"rerank-{results.request_id}", "results": ranked})

    async def _read(self, request: Request) -> tuple[Call, Mapping[str, object]]:
        identity = self.authenticator.authenticate(request.headers.get("authorization"))
        timeout = request.headers.get("x-request-timeout")
        call = Call(
            identity=identity,
            request_id=request.scope["state"]["client_request_id"],
            trace=TraceHeaders(request.headers.get("traceparent", ""), request.headers.get("tracestate", "")),
            deadline_s=None if timeout is None else validate.timeout_s(timeout),
        )
        return call, await read_json(request.receive, request.headers, self.limits)


def _head(kind: str, results: Results) -> Json:
    return {"id": f"{kind}-{results.request_id}", "object": "list", "created": results.created_unix_s}


def _classified(index: int, probabilities: Sequence[float], labels: Sequence[str]) -> Json:
    best = max(range(len(labels)), key=lambda number: probabilities[number])
    return {"index": index, "label": labels[best], "probs": list(probabilities), "num_classes": len(labels)}


def _encoded(vector: Sequence[float]) -> str:
    """float32, little-endian, as OpenAI's clients read it."""
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()


def _answer(request: Request, results: Results, content: Json) -> Response:
    request.scope["state"]["request_id"] = results.request_id
    usage = {"prompt_tokens": results.prompt_tokens, "total_tokens": results.prompt_tokens}
    whole = {**content, "model": results.model.name, "usage": usage}
    headers = {"llmos-model-version": results.model.version.encode("ascii", "replace").decode()}
    return Response(msgspec.json.encode(whole), media_type="application/json", headers=headers)
