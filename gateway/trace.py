"""The gateway's spans of a request, in the names of OpenTelemetry's GenAI conventions. Never any text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from opentelemetry.util.types import AttributeValue

from gateway.types import GenerationRequest, Identity
from llmos.errors import LlmosError
from llmos.telemetry import REQUEST_ID, Telemetry

if TYPE_CHECKING:
    from gateway.stream import Stream

_OPERATION = {"chat": "chat", "completion": "text_completion"}


def span_name(request: GenerationRequest) -> str:
    """`chat {model}` or `text_completion {model}`."""
    return f"{_OPERATION[request.kind]} {request.model}"


def start_attributes(
    request: GenerationRequest, identity: Identity, inner_id: str, public_id: str, version: str
) -> Mapping[str, AttributeValue]:
    """What is known when the root span opens."""
    params = request.params
    attributes: dict[str, AttributeValue | None] = {
        REQUEST_ID: inner_id,
        "llmos.tenant": identity.tenant,
        "llmos.model_version": version,
        "gen_ai.operation.name": _OPERATION[request.kind],
        "gen_ai.provider.name": "llmos",
        "gen_ai.request.model": request.model,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.request.frequency_penalty": params.frequency_penalty,
        "gen_ai.request.presence_penalty": params.presence_penalty,
        "gen_ai.request.choice.count": params.n,
        "gen_ai.response.id": public_id,
    }
    return {name: value for name, value in attributes.items() if value is not None}


def finish_span(telemetry: Telemetry, stream: Stream, error: LlmosError | None) -> None:
    """Close a request's root span with what came out."""
    stream.span.set_attribute("gen_ai.usage.output_tokens", stream.transcript.completion_tokens)
    reasons = [reason for _, reason in sorted(stream.finish_reasons.items())]
    if reasons:
        stream.span.set_attribute("gen_ai.response.finish_reasons", reasons)
    telemetry.finish(stream.span, error.code if error else "")
