"""The gateway's spans of a request, in the names of OpenTelemetry's GenAI conventions. Never any text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from opentelemetry.trace import Span
from opentelemetry.util.types import AttributeValue

from gateway.types import GenerationRequest, Identity, Params, Started, TaskRequest
from llmos.errors import LlmosError
from llmos.internal.v1 import request_pb2
from llmos.telemetry import REQUEST_ID, Telemetry

_OPERATION = {
    "chat": "chat",
    "completion": "text_completion",
    "embed": "embeddings",
    "classify": "classify",
    "score": "score",
}


def span_name(request: GenerationRequest | TaskRequest) -> str:
    """`chat {model}`, `text_completion {model}`, `embeddings {model}`, ..."""
    return f"{_OPERATION[request.kind]} {request.model}"


def start_attributes(
    request: GenerationRequest | TaskRequest, identity: Identity, inner_id: str, public_id: str, version: str
) -> Mapping[str, AttributeValue]:
    """What is known when the root span opens."""
    attributes: dict[str, AttributeValue | None] = {
        REQUEST_ID: inner_id,
        "llmos.tenant": identity.tenant,
        "llmos.model_version": version,
        "gen_ai.operation.name": _OPERATION[request.kind],
        "gen_ai.provider.name": "llmos",
        "gen_ai.request.model": request.model,
        "gen_ai.response.id": public_id,
    }
    if isinstance(request, GenerationRequest):
        attributes |= _sampling(request.params)
    return {name: value for name, value in attributes.items() if value is not None}


def take_up_attributes(request: request_pb2.Request, started: Started, claim: int) -> Mapping[str, AttributeValue]:
    """What is known when a client comes back to its stream."""
    return {
        REQUEST_ID: request.request_id,
        "llmos.tenant": request.tenant,
        "llmos.model_version": started.model_version,
        "llmos.claim": claim,
        "gen_ai.provider.name": "llmos",
        "gen_ai.request.model": started.model,
        "gen_ai.response.id": started.request_id,
    }


def _sampling(params: Params) -> Mapping[str, AttributeValue | None]:
    return {
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.request.frequency_penalty": params.frequency_penalty,
        "gen_ai.request.presence_penalty": params.presence_penalty,
        "gen_ai.request.choice.count": params.n,
    }


class RequestTrace:
    """The root span of a submitted request, and below it what the gateway sees of the fleet's work: `first_output` from
    the hand-over to the first output, `stream` from there to the end. What these take beyond the scheduler's stages is
    the way there and back."""

    def __init__(self, telemetry: Telemetry, root: Span, request_id: str) -> None:
        self._telemetry = telemetry
        self._root = root
        self._request_id = request_id
        self._stage: Span | None = None
        self._has_output = False

    def submitted(self) -> None:
        """The request is on its way to the scheduler."""
        self._stage = self._open("first_output", self._telemetry.now())

    def output(self) -> None:
        """Output has come; only the first time counts."""
        if self._has_output or self._stage is None:
            return
        self._has_output = True
        now = self._telemetry.now()
        self._telemetry.finish(self._stage, end_ns=now)
        self._stage = self._open("stream", now)

    def finish(self, output_tokens: int, reasons: Sequence[str], error: LlmosError | None) -> None:
        """The request has ended. Once."""
        code, now = error.code if error else "", self._telemetry.now()
        if self._stage is not None:
            self._telemetry.finish(self._stage, code, now)
        self._root.set_attribute("gen_ai.usage.output_tokens", output_tokens)
        if reasons:
            self._root.set_attribute("gen_ai.response.finish_reasons", reasons)
        self._telemetry.finish(self._root, code, now)

    def _open(self, name: str, start_ns: int) -> Span:
        parent = self._root.get_span_context()
        return self._telemetry.start(name, parent=parent, attributes={REQUEST_ID: self._request_id}, start_ns=start_ns)
