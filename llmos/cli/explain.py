"""`llmos explain`: why a request, a model or an allocation is not running, or where it runs."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from llmos.cli import output
from llmos.cli.completion import explainable
from llmos.cli.flags import AsJson, DataDir

if TYPE_CHECKING:
    from llmos.cli.connection import Target
    from llmos.v1.fleet_pb2 import ExplainResponse

Subject = Annotated[
    str,
    typer.Argument(metavar="REQUEST|MODEL|ALLOCATION", help="Id of a request, or a name.", autocompletion=explainable),
]


def explain(subject: Subject, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Say why something is not running, or where it runs: per worker what was found, with the numbers."""
    from llmos.cli.connection import find_target

    answer = asyncio.run(_explain(find_target(data_dir), subject))
    if as_json:
        output.print_json(
            {
                "id": subject,
                "kind": answer.kind,
                "verdict": answer.verdict,
                "findings": [
                    {"subject": found.subject, "code": found.code, "message": found.message}
                    for found in answer.findings
                ],
            }
        )
        return
    output.write(f"{answer.kind} {subject}: {answer.verdict}\n")
    if answer.findings:
        rows = [[found.subject, found.code, found.message] for found in answer.findings]
        output.print_table(["SUBJECT", "FINDING", "WHY"], rows, empty="")


async def _explain(target: Target, subject: str) -> ExplainResponse:
    from llmos.cli.connection import CALL_TIMEOUT_S, connect
    from llmos.v1 import fleet_pb2

    async with connect(target) as fleet:
        request = fleet_pb2.ExplainRequest(id=subject)
        return await fleet.fleet.Explain(request, metadata=fleet.metadata, timeout=CALL_TIMEOUT_S)
