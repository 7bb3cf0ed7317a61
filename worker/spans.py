"""A worker's part of a request's trace: `execute` below the scheduler's attempt, the engine's stages below that."""

from __future__ import annotations

from collections.abc import Sequence

from opentelemetry.trace import Span

from llmos.internal.v1 import work_pb2
from llmos.telemetry import REQUEST_ID, Telemetry, remote_context
from llmos.v1 import fleet_pb2
from worker import wire
from worker.backend import Epoch


class ExecuteSpans:
    """Opens and closes the spans of running attempts. One owner."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._open: dict[tuple[str, Epoch], Span] = {}

    def begin(self, dispatch: work_pb2.Dispatch) -> None:
        """An attempt was accepted."""
        epoch = wire.epoch_from_wire(dispatch.epoch)
        resumed = sum(len(entry.token_ids) for entry in dispatch.request.resume)
        self._open[dispatch.request.request_id, epoch] = self._telemetry.start(
            "execute",
            parent=remote_context(dispatch.trace.traceparent, dispatch.trace.tracestate),
            attributes={
                REQUEST_ID: dispatch.request.request_id,
                wire.TERM: epoch.term,
                wire.ATTEMPT: epoch.attempt,
                "gen_ai.request.model": dispatch.request.model,
                "llmos.resumed_tokens": resumed,
            },
        )

    def stage(self, stage: fleet_pb2.Span) -> None:
        """A stage of the engine ended (`wire.stage_to_wire`). Stages of attempts that are closed are left out."""
        request_id, epoch = wire.stage_epoch(stage)
        parent = self._open.get((request_id, epoch))
        if parent is None:
            return
        span = self._telemetry.start(
            stage.name,
            parent=parent.get_span_context(),
            attributes={REQUEST_ID: request_id, wire.TOKENS: int(stage.attributes[wire.TOKENS])},
            start_ns=self._telemetry.at(stage.start_unix_ns / 1e9),
        )
        self._telemetry.finish(span, end_ns=self._telemetry.at(stage.end_unix_ns / 1e9))

    def end(self, request_id: str, epoch: Epoch, error: str = "") -> None:
        """An attempt ended; `error` is a code, or empty."""
        span = self._open.pop((request_id, epoch), None)
        if span is not None:
            self._telemetry.finish(span, error)

    def drain(self) -> Sequence[fleet_pb2.Span]:
        """Finished spans for the next frame."""
        return self._telemetry.drain()
