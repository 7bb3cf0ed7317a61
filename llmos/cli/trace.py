"""`llmos trace`: what happened to one request, from the scheduler's ring of spans; no collector is needed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmos.cli import output
from llmos.cli.completion import request_ids
from llmos.cli.flags import AsJson, DataDir
from llmos.cli.span_picture import picture
from llmos.cli.span_tree import SpanRow, TreeRow, covered, draw

if TYPE_CHECKING:
    from llmos.cli.connection import Target
    from llmos.v1.fleet_pb2 import Span

_BAR_CELLS = 24
_NOTED = {"llmos.hedge": "hedge", "llmos.worker": "on"}
"""Attributes that an attempt's line shows, and the word before each."""

Request = Annotated[str, typer.Argument(metavar="ID", help="A request id or a trace id.", autocompletion=request_ids)]
Svg = Annotated[
    Path | None, typer.Option("--svg", metavar="FILE", dir_okay=False, help="Write a picture to FILE instead.")
]


def trace(request: Request, data_dir: DataDir = None, as_json: AsJson = False, svg: Svg = None) -> None:
    """Draw where the time of a request went."""
    from llmos.cli.connection import find_target
    from llmos.errors import NotFound, SetupError

    spans = asyncio.run(_fetch(find_target(data_dir), request))
    if not spans:
        raise NotFound(f"no finished span of {request} is held any more")
    if as_json:
        output.print_json([_span_json(span) for span in spans])
        return
    rows = [span_row(span) for span in spans]
    if svg is not None:
        try:
            svg.write_text(picture(rows, f"Request {request}"), encoding="utf-8")
        except OSError as error:
            raise SetupError(f"{svg} cannot be written: {error.strerror}") from error
        output.write(f"{len(spans)} spans drawn in {svg}\n")
        return
    lines = draw(rows)
    columns = ["SPAN", "SERVICE", "NODE", "START", "TIME", ""]
    output.print_table(columns, [_cells(line, _length_s(rows)) for line in lines], empty="no spans")
    output.write(
        f"trace {spans[0].trace_id.hex()}: {len(spans)} spans in {output.seconds_text(_length_s(rows))}, "
        f"{covered(rows):.1%} covered\n"
    )


async def _fetch(target: Target, request_or_trace: str) -> list[Span]:
    from llmos.cli.connection import CALL_TIMEOUT_S, connect
    from llmos.v1 import fleet_pb2

    async with connect(target) as fleet:
        request = fleet_pb2.GetTraceRequest(id=request_or_trace)
        return list((await fleet.fleet.GetTrace(request, metadata=fleet.metadata, timeout=CALL_TIMEOUT_S)).spans)


def span_row(span: Span) -> SpanRow:
    """A span from the wire as the tree takes it."""
    return SpanRow(
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.name,
        span.service,
        span.node,
        span.start_unix_ns,
        span.end_unix_ns,
        span.error,
        tuple(linked.hex() for linked in span.linked_span_ids),
        _note(span),
    )


def _note(span: Span) -> str:
    if span.name != "attempt":
        return ""
    return ", ".join(f"{said} {span.attributes[name]}" for name, said in _NOTED.items() if name in span.attributes)


def _span_json(span: Span) -> dict[str, object]:
    return {
        "trace_id": span.trace_id.hex(),
        "span_id": span.span_id.hex(),
        "parent_span_id": span.parent_span_id.hex(),
        "name": span.name,
        "service": span.service,
        "node": span.node,
        "start_unix_ns": span.start_unix_ns,
        "end_unix_ns": span.end_unix_ns,
        "attributes": dict(span.attributes),
        "error": span.error,
        "linked_span_ids": [linked.hex() for linked in span.linked_span_ids],
    }


def _length_s(rows: Sequence[SpanRow]) -> float:
    return (max(row.end_ns for row in rows) - min(row.start_ns for row in rows)) / 1e9


def _cells(line: TreeRow, whole_s: float) -> list[str]:
    times = [f"+{output.seconds_text(line.start_s)}", output.seconds_text(line.duration_s)]
    bar = _bar(line, whole_s)
    if line.span is None:
        return [f"{line.prefix}(gap)", "", "", *times, bar]
    name = f"{line.prefix}{line.span.name}"
    if line.span.links:
        name += " (another attempt)"
    if line.span.note:
        name += f" ({line.span.note})"
    if line.span.error:
        name += f" ! {line.span.error}"
    return [name, line.span.service, line.span.node, *times, bar]


def _bar(line: TreeRow, whole_s: float) -> str:
    if not whole_s:
        return ""
    begin = min(_BAR_CELLS - 1, int(line.start_s / whole_s * _BAR_CELLS))
    cells = max(1, min(_BAR_CELLS - begin, round(line.duration_s / whole_s * _BAR_CELLS)))
    return " " * begin + ("·" if line.span is None else "█") * cells
