"""The session layer: turns valid requests into running streams and hands out what the link brings.

The life of a request here: find the model, render and tokenize, check against the context, name it, open its span,
submit it, then output by output through its stream until the last choice has ended.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterable, Mapping, Sequence

from opentelemetry.trace import Span, SpanKind

from gateway import request_id as request_ids
from gateway.catalogue import Catalogue, TextRules
from gateway.comeback import Comeback, Comebacks, handle_of
from gateway.failure import for_client
from gateway.leader import LeaderClient
from gateway.prepare import Prompt, fit, fleet_request, new_transcript, traced_tokenize
from gateway.remainder import Remainder
from gateway.session_config import SessionConfig
from gateway.stream import Handle, Stream, StreamLimits, Upstream
from gateway.tiers import granted
from gateway.trace import RequestTrace, span_name, start_attributes
from gateway.transcript import Transcript, Verdict
from gateway.types import (
    Delta,
    GenerationRequest,
    Held,
    Identity,
    ModelInfo,
    Started,
    TakenUp,
    TaskRequest,
    TraceHeaders,
)
from gateway.values import ValuesTranscript
from gateway.vault import Vault
from llmos.clock import Clock
from llmos.errors import (
    Cancelled,
    Conflict,
    InternalError,
    InvalidRequest,
    LlmosError,
    Overloaded,
    Unavailable,
)
from llmos.internal.v1 import request_pb2, requests_pb2
from llmos.telemetry import Telemetry, remote_context, trace_headers
from llmos.v1 import fleet_pb2

log = logging.getLogger(__name__)

_ALL_REQUESTS = 100_000
_COUNTED = {verdict: f"outputs_{verdict.value}" for verdict in Verdict}
"""Names of the counters."""
AnyRequest = GenerationRequest | TaskRequest


class Sessions:
    """Implements `gateway.types.Engine` and `gateway.link.Receiver`. Owns every running stream; one loop only."""

    def __init__(
        self,
        link: Upstream,
        catalogue: Catalogue,
        config: SessionConfig,
        *,
        clock: Clock,
        telemetry: Telemetry,
        leader: LeaderClient | None = None,
        rng: random.Random | None = None,
        vault: Vault | None = None,
    ) -> None:
        """`leader` finds requests that run at other gateways; `rng` makes ids and seeds: by default unguessable;
        `vault` seals what other gateways need to go on with a stream."""
        self._link = link
        self._catalogue = catalogue
        self._config = config
        self._clock = clock
        self._telemetry = telemetry
        self._leader = leader
        self._rng = rng or random.SystemRandom()
        self._vault = vault or Vault(rng=self._rng)
        self._comebacks = Comebacks(
            leader, self._vault, catalogue, telemetry=telemetry, clock=clock, patience_s=config.leader_grace_s
        )
        self._limits = StreamLimits(config.buffer_bytes, config.gap_limit)
        self._streams: dict[str, Stream] = {}
        self._named: dict[tuple[str, str], Stream] = {}
        self._preparing = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._retiring = self._closed = False
        self._grace_timer: asyncio.TimerHandle | None = None
        self._counts = dict.fromkeys([*_COUNTED.values(), "outputs_unknown", "requests", "slow_readers", "taken_up"], 0)

    # What the edges ask for (Engine)

    async def generate(
        self, request: AnyRequest, identity: Identity, *, request_id: str, trace: TraceHeaders
    ) -> Stream:
        """See `Engine`. The stream is registered and submitted when this returns."""
        self._admit()
        model = self._catalogue.find(request.model, request.kind)
        base = self._catalogue.base_of(model)
        inner_id, public_id = self._name(request, identity, request_id)
        span = self._telemetry.start(
            span_name(request),
            parent=remote_context(trace.traceparent, trace.tracestate),
            kind=SpanKind.SERVER,
            attributes=start_attributes(request, identity, inner_id, public_id, model.version),
        )
        self._preparing += 1
        try:
            rules = await self._catalogue.rules(model)
            prompt = await traced_tokenize(request, model, rules, self._telemetry, span, inner_id)
            return self._begin(request, identity, model, base, rules, prompt, span, inner_id, public_id)
        except BaseException as error:
            self._telemetry.finish(span, error.code if isinstance(error, LlmosError) else "cancelled")
            raise
        finally:
            self._preparing -= 1

    async def take_up(
        self,
        request_id: str,
        identity: Identity,
        held: Sequence[Held],
        *,
        trace: TraceHeaders,
        deadline_s: float | None = None,
    ) -> TakenUp:
        """See `Engine`. A stream that still runs, here or at another gateway, is taken from whoever reads it there."""
        self._admit()
        self._preparing += 1
        try:
            comeback = await self._comebacks.find(request_id, identity.tenant, held)
            stream = self._go_on(comeback, trace, deadline_s)
        finally:
            self._preparing -= 1
        return TakenUp(stream, comeback.recipe.kind, comeback.recipe.started.model, comeback.view)

    def _go_on(self, comeback: Comeback, trace: TraceHeaders, deadline_s: float | None) -> Stream:
        """Open a stream that a client came back to, in the place of the one that may still be here."""
        old = self._streams.get(comeback.request.request_id)
        if old is not None:
            if old.claim > comeback.handle.claim:
                raise Conflict("The stream was taken up once more in the meantime.", param="request_id")
            old.fail(Cancelled("The stream was taken up elsewhere."), deliver=False)
        self._counts["taken_up"] += 1
        return self._open(
            comeback.request,
            comeback.recipe.started,
            comeback.transcript,
            self._comebacks.span(comeback, trace),
            comeback.deltas,
            deadline_s=deadline_s,
            constraint_field=comeback.recipe.constraint_field,
            handle=comeback.handle,
            remainder=comeback.remainder,
        )

    async def cancel(self, request_id: str, identity: Identity) -> bool:
        """See `Engine`. A request of another gateway is cancelled through the scheduler."""
        stream = self._named.get((identity.tenant, request_id))
        if stream is not None:
            stream.abort(Cancelled("The request was cancelled."), "cancelled")
            return True
        if self._leader is None or not self._link.connected:
            return False
        listing = await self._leader.list_requests(fleet_pb2.ListRequestsRequest(limit=_ALL_REQUESTS))
        for row in listing.requests:
            if row.tenant == identity.tenant and request_ids.names(request_id, row.request_id, identity.tenant):
                return await self._leader.kill_request(row.request_id)
        return False

    def models(self) -> Sequence[ModelInfo]:
        """See `Engine`."""
        return self._catalogue.models()

    def ready(self) -> bool:
        """See `Engine`."""
        return self._link.connected and not self._retiring and bool(self._catalogue.models())

    def retire(self) -> None:
        """Be ready no more, so that clients are sent elsewhere. Who comes all the same is still served."""
        self._retiring = True

    async def idle(self) -> None:
        """Wait until no request runs."""
        await self._idle.wait()

    def close(self) -> None:
        """Refuse new requests from now on, and end what still runs with a typed, resumable error."""
        self._closed = True
        for stream in list(self._streams.values()):
            stream.fail(Unavailable("This gateway is shutting down; resume the stream.", retry_after_s=1.0))

    def counters(self) -> Mapping[str, int]:
        """Totals since the start, and requests running now."""
        return {**self._counts, "running": len(self._streams)}

    # What the link brings (Receiver)

    def on_connected(self, term: int) -> Iterable[requests_pb2.Submit]:
        """See `Receiver`."""
        self._stop_grace()
        return [stream.reconnected() for stream in self._streams.values()]

    def on_lost(self) -> None:
        """See `Receiver`."""
        self._stop_grace()
        self._grace_timer = asyncio.get_running_loop().call_later(self._config.leader_grace_s, self._give_up)

    def on_catalogue(self, catalogue: requests_pb2.Catalogue, term: int) -> None:
        """See `Receiver`."""
        self._catalogue.replace(catalogue, term)

    def on_frame(self, frame: requests_pb2.GatewayFrame) -> None:
        """See `Receiver`."""
        for change in frame.class_changes:
            stream = self._streams.get(change.request_id)
            if stream is not None:
                stream.reclassified(change.priority)
        for output in frame.outputs:
            self._deliver(output)
        for failure in frame.failures:
            self._fail(failure)

    # How

    def _admit(self) -> None:
        if self._closed:
            raise Unavailable("This gateway is shutting down; try another one.", retry_after_s=1.0)
        lost = self._link.lost_for_s
        if lost is None or lost > self._config.leader_grace_s:
            raise Unavailable("No scheduler leads at the moment; try again.", retry_after_s=1.0)
        if len(self._streams) + self._preparing >= self._config.max_requests:
            raise Overloaded("This gateway has as many requests as it can hold; try again.", retry_after_s=1.0)

    def _name(self, request: AnyRequest, identity: Identity, client_id: str) -> tuple[str, str]:
        """The request's inner and public id. A resumed one keeps its public id and takes the old stream's place."""
        resumed = request.resume_request_id
        given = resumed or client_id
        if request_ids.is_acceptable(given):
            public_id, inner_id = given, request_ids.inside(given, identity.tenant)
        else:
            public_id = inner_id = request_ids.generate(self._rng)
        old = self._named.get((identity.tenant, public_id))
        if old is not None and not resumed:
            raise _in_use()
        if old is not None:
            old.abort(Cancelled("The stream was resumed elsewhere."), "cancelled")
        return (request_ids.again(inner_id, self._rng) if resumed else inner_id), public_id

    def _begin(
        self,
        request: AnyRequest,
        identity: Identity,
        model: requests_pb2.CatalogueModel,
        base: requests_pb2.CatalogueModel,
        rules: TextRules,
        prompt: Prompt,
        span: Span,
        inner_id: str,
        public_id: str,
    ) -> Stream:
        max_tokens = fit(request, prompt.token_ids, model)
        seed = self._seed(request)
        wire = fleet_request(
            request,
            identity,
            model,
            base,
            prompt,
            inner_id=inner_id,
            seed=seed,
            max_tokens=max_tokens,
            salt=self._config.prefix_salt.encode(),
        )
        wire.trace.traceparent, wire.trace.tracestate = trace_headers(span)
        created = self._clock.unix_ns() // 1_000_000_000
        got = granted(identity.priority, request.priority)
        started = Started(public_id, model.name, model.version, seed, created, len(prompt.token_ids), got)
        transcript = new_transcript(request, rules, max_tokens, model)
        deltas = transcript.resume(request.resume)
        return self._open(
            wire,
            started,
            transcript,
            span,
            deltas,
            deadline_s=request.deadline_s,
            constraint_field="" if (constraint := request.params.constraint) is None else constraint.field,
            handle=handle_of(request, wire, started, model, self._vault),
        )

    def _open(
        self,
        wire: request_pb2.Request,
        started: Started,
        transcript: Transcript | ValuesTranscript,
        span: Span,
        deltas: Iterable[Delta],
        *,
        deadline_s: float | None,
        constraint_field: str,
        handle: Handle,
        remainder: Remainder | None = None,
    ) -> Stream:
        stream = Stream(
            wire,
            started,
            transcript,
            RequestTrace(self._telemetry, span, wire.request_id),
            uplink=self._link,
            clock=self._clock,
            deadline=self._clock.monotonic() + min(deadline_s or 1e9, self._config.max_request_s),
            limits=self._limits,
            on_end=self._on_end,
            constraint_field=constraint_field,
            handle=handle,
            remainder=remainder,
        )
        self._register(stream)
        stream.begin(deltas)
        return stream

    def _seed(self, request: AnyRequest) -> int:
        params = request.params
        if params.seed is not None:
            return params.seed
        if request.resume and params.temperature > 0:
            raise InvalidRequest("To resume a stream, send the seed that its start reported.", param="seed")
        return self._rng.getrandbits(63)

    def _register(self, stream: Stream) -> None:
        if (stream.tenant, stream.request_id) in self._named:
            raise _in_use()
        self._counts["requests"] += 1
        self._streams[stream.inner_id] = stream
        self._named[stream.tenant, stream.request_id] = stream
        self._idle.clear()

    def _forget(self, stream: Stream) -> None:
        self._streams.pop(stream.inner_id, None)
        name = (stream.tenant, stream.request_id)
        if self._named.get(name) is stream:
            del self._named[name]
        if not self._streams:
            self._idle.set()

    def _on_end(self, stream: Stream, error: LlmosError | None) -> None:
        self._forget(stream)
        if error is not None and error.code == "slow_reader":
            self._counts["slow_readers"] += 1
        reasons = [reason for _, reason in sorted(stream.finish_reasons.items())]
        stream.trace.finish(stream.transcript.completion_tokens, reasons, error)

    def _deliver(self, output: request_pb2.Output) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:
            self._counts["outputs_unknown"] += 1
            return
        try:
            verdict = stream.take(output)
        except Exception:  # a bug met by one request must not end the others
            log.exception("output of request %s could not be taken", output.request_id)
            stream.abort(InternalError("Something broke inside; the request id helps to find it."), "cancelled")
            return
        self._counts[_COUNTED[verdict]] += 1

    def _fail(self, failure: request_pb2.Failure) -> None:
        stream = self._streams.get(failure.request_id)
        epoch = (failure.epoch.term, failure.epoch.attempt)
        if (
            stream is None
            or (failure.HasField("epoch") and epoch < stream.transcript.epoch)
            or (failure.HasField("claim") and failure.claim < stream.claim)  # of the one before it, lost to a third
        ):
            self._counts["outputs_unknown" if stream is None else "outputs_stale"] += 1
            return
        stream.fail(for_client(failure, stream.constraint_field))

    def _stop_grace(self) -> None:
        if self._grace_timer is not None:
            self._grace_timer.cancel()
            self._grace_timer = None

    def _give_up(self) -> None:
        for stream in list(self._streams.values()):
            stream.fail(Unavailable("The fleet has no leader; resume the stream later.", retry_after_s=5.0))


def _in_use() -> Conflict:
    return Conflict("A request of this id is running; choose another x-request-id.", param="x-request-id")
