"""`llmos top`: what the fleet does now, live or as one snapshot."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from llmos.cli import output
from llmos.cli.flags import DataDir

if TYPE_CHECKING:
    from llmos.cli.top_snapshot import Fleet, Snapshot

Once = Annotated[bool, typer.Option("--once", help="Print one snapshot and end.")]
Json = Annotated[bool, typer.Option("--json", help="Print one snapshot as JSON for programs.")]
Interval = Annotated[float, typer.Option("--interval", "-i", min=0.2, max=60.0, help="Seconds between two looks.")]


def top(data_dir: DataDir = None, once: Once = False, as_json: Json = False, interval: Interval = 1.0) -> None:
    """Watch workers, models, queues and requests; kill, nice or drain what is selected."""
    from llmos.cli.connection import find_target
    from llmos.cli.top_snapshot import Fleet, snapshot_json

    fleet = Fleet(lambda: find_target(data_dir))
    if as_json:
        output.print_json(snapshot_json(asyncio.run(fleet.look())))
    elif once:
        _print(asyncio.run(fleet.look()))
    else:
        _watch(fleet, interval)


def _watch(fleet: Fleet, interval: float) -> None:
    from llmos.errors import MissingExtra

    try:
        from llmos.cli.top_app import TopApp
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "textual":
            raise
        raise MissingExtra("top", "The live view (`llmos top --once` prints one snapshot without it)") from error
    first = asyncio.run(fleet.look())  # what is wrong from the start is an error, not a view that reconnects
    app = TopApp(fleet, first, interval)
    app.run()
    if app.failure is not None:
        raise app.failure


def _print(snapshot: Snapshot) -> None:
    from llmos.cli import top_snapshot as rows

    output.write(f"{snapshot.headline()}\n")
    tables = (
        (rows.WORKER_COLUMNS, rows.worker_rows(snapshot), "no workers"),
        (rows.MODEL_COLUMNS, rows.model_rows(snapshot), "no models"),
        (rows.QUEUE_COLUMNS, rows.queue_rows(snapshot), "no queues"),
        (rows.REQUEST_COLUMNS, rows.request_rows(snapshot), "no requests"),
    )
    for columns, found, empty in tables:
        output.print_table(columns, [cells for _, cells in found], empty=empty)
