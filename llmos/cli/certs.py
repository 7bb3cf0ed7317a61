"""`llmos certs`: certificates for development."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from llmos.cli import output

Folder = Annotated[Path, typer.Argument(help="Folder to write to; made if missing, nothing in it is overwritten.")]
Hosts = Annotated[
    list[str] | None, typer.Option("--host", help="Name or address of the server besides loopback; may be repeated.")
]
Days = Annotated[int, typer.Option("--days", help="How long the certificates hold.")]


def certs(folder: Folder, host: Hosts = None, days: Days = 90) -> None:
    """Make a development CA with a server and a client certificate."""
    from llmos.certs import make_certificates

    files = make_certificates(folder, host or [], days, datetime.now(UTC))
    server = (
        f"--tls-ca-file {files.ca} --tls-cert-file {files.certificate('server')} --tls-key-file {files.key('server')}"
    )
    output.write(f"wrote a development CA to {folder}\n")
    output.write(f"services:  {server}\n")
    output.write(f"clients:   LLMOS_CA_FILE={files.ca}\n")
