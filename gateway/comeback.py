"""A client comes back to a stream: find what is remembered of it, and make of that what goes on here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from opentelemetry.trace import Span, SpanKind

from gateway import request_id as request_ids
from gateway.catalogue import Catalogue, TextRules
from gateway.leader import LeaderClient
from gateway.remainder import Remainder
from gateway.stream import Handle
from gateway.text.choice import ChoiceText
from gateway.trace import take_up_attributes
from gateway.transcript import Shape, Transcript
from gateway.types import Delta, GenerationRequest, Held, Started, TaskRequest, TraceHeaders, View
from gateway.vault import Recipe, Unreadable, Vault
from llmos.clock import Clock
from llmos.errors import DeadlineExceeded, NotFound, Unavailable
from llmos.internal.v1 import journal_pb2, request_pb2, requests_pb2
from llmos.telemetry import Telemetry, remote_context, trace_headers

log = logging.getLogger(__name__)

_AGAIN_S = 0.2


@dataclass(frozen=True, slots=True)
class Comeback:
    """A remembered stream as it goes on here."""

    request: request_pb2.Request
    recipe: Recipe
    view: View
    transcript: Transcript
    deltas: Sequence[Delta]
    """What is known of its output, from the first token on."""
    remainder: Remainder
    handle: Handle


class Comebacks:
    """Finds streams that clients come back to. Used by the sessions, which run them."""

    def __init__(
        self,
        leader: LeaderClient | None,
        vault: Vault,
        catalogue: Catalogue,
        *,
        telemetry: Telemetry,
        clock: Clock,
        patience_s: float,
    ) -> None:
        """`patience_s` is how long a client waits while no scheduler leads."""
        self._leader = leader
        self._vault = vault
        self._catalogue = catalogue
        self._telemetry = telemetry
        self._clock = clock
        self._patience_s = patience_s

    async def find(self, request_id: str, tenant: str, held: Sequence[Held]) -> Comeback:
        """The stream that a client of this tenant calls so, for one who holds so much of it. From then on nobody else
        may go on with it. Raises NotFound, InvalidRequest, Unavailable."""
        if not request_ids.is_acceptable(request_id):
            raise _nothing()
        names = (request_ids.inside(request_id, tenant), request_id)
        entry = await self._ask(tenant, names)
        try:
            recipe = self._vault.open(entry.sealed, tenant, entry.request.request_id)
        except Unreadable:
            log.warning("a stream was sealed under another key: give all gateways the same stream_key_file")
            raise _nothing() from None
        rules = await self._catalogue.rules(requests_pb2.CatalogueModel(tokenizer_hash=recipe.tokenizer_hash))
        return _revived(entry, recipe, rules, held)

    def span(self, comeback: Comeback, trace: TraceHeaders) -> Span:
        """The root span of what goes on here; the request carries it from now on."""
        request, started = comeback.request, comeback.recipe.started
        span = self._telemetry.start(
            f"take_up {started.model}",
            parent=remote_context(trace.traceparent, trace.tracestate),
            kind=SpanKind.SERVER,
            attributes=take_up_attributes(request, started, comeback.handle.claim),
        )
        request.trace.traceparent, request.trace.tracestate = trace_headers(span)
        return span

    async def _ask(self, tenant: str, names: Sequence[str]) -> journal_pb2.JournalEntry:
        if self._leader is None:
            raise Unavailable("No scheduler leads at the moment; try again.", retry_after_s=1.0)
        until = self._clock.monotonic() + self._patience_s
        while True:
            try:
                return await self._leader.take_up(tenant, names)
            except NotFound:
                raise _nothing() from None
            except (Unavailable, DeadlineExceeded):  # it changes just now
                if self._clock.monotonic() >= until:
                    raise
            await asyncio.sleep(_AGAIN_S)


def _revived(entry: journal_pb2.JournalEntry, recipe: Recipe, rules: TextRules, held: Sequence[Held]) -> Comeback:
    request = entry.request
    remainder = Remainder(held, request.choices, request.max_tokens)

    def new_text() -> ChoiceText:
        return ChoiceText(rules.tokenizer.detokenizer(continuation=recipe.kind == "completion"), recipe.stop)

    shape = Shape(request.choices, request.max_tokens, recipe.vocab_size, request.sampling.HasField("logprobs"))
    transcript = Transcript(shape, new_text, rules.tokenizer.token_bytes)
    transcript.cached_tokens = entry.cached_tokens
    deltas = [delta for said in entry.choices for delta in transcript.replay(said, remainder.tokens_of(said.choice))]
    handle = Handle(entry.sealed, entry.origin_id, entry.claim)
    view = recipe.view or View(logprobs=shape.logprobs)
    return Comeback(request, recipe, view, transcript, deltas, remainder, handle)


def handle_of(
    request: GenerationRequest | TaskRequest,
    wire: request_pb2.Request,
    started: Started,
    model: requests_pb2.CatalogueModel,
    vault: Vault,
) -> Handle:
    """What lets the client of a new stream come back to it."""
    if isinstance(request, TaskRequest) or request.is_part:
        return Handle()
    params = request.params
    recipe = Recipe(
        started,
        request.kind,
        model.tokenizer_hash,
        model.vocab_size,
        params.stop,
        "" if params.constraint is None else params.constraint.field,
        request.view,
    )
    origin_id = request_ids.origin(wire.request_id) if request.resume_request_id else ""
    return Handle(vault.seal(recipe, wire.tenant, wire.request_id), origin_id)


def _nothing() -> NotFound:
    return NotFound("Nothing is remembered of such a stream: it never was, or is over for too long.")
