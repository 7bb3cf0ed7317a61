"""`llmos keys`: make, list and remove API keys."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

from llmos.cli import output
from llmos.cli.flags import AsJson

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

KeysFile = Annotated[
    Path, typer.Option("--file", "-f", help="The keys file; give the same to `python -m gateway --keys-file`.")
]
_DEFAULT_FILE = Path("llmos-keys.json")


@app.command("add")
def add(
    tenant: Annotated[str, typer.Option("--tenant", help="Who is charged for what the key asks.")],
    role: Annotated[Literal["user", "operator"], typer.Option("--role", help="Operators may kill and drain.")] = "user",
    priority: Annotated[
        Literal["interactive", "standard", "batch"], typer.Option("--class", help="Class of service.")
    ] = "standard",
    file: KeysFile = _DEFAULT_FILE,
    as_json: AsJson = False,
) -> None:
    """Make a key. It is shown this once; the file keeps a salted hash."""
    from llmos.keys import add_key

    key, record = add_key(file, tenant, role=role, priority=priority, now_unix_s=int(time.time()))
    if as_json:
        output.print_json({"key": key, "id": record.id, "tenant": tenant, "role": role, "class": priority})
        return
    output.note(f"Key {record.id} of tenant {tenant} ({role}, {priority}), in {file}. Keep it: it is not shown again.")
    output.write(f"{key}\n")


@app.command("ls")
def ls(file: KeysFile = _DEFAULT_FILE, as_json: AsJson = False) -> None:
    """List the keys of a file: whom they name, never the keys themselves."""
    from llmos.keys import read_keys

    records = read_keys(file)
    if as_json:
        output.print_json(
            [
                {"id": r.id, "tenant": r.tenant, "role": r.role, "class": r.priority, "created": r.created_unix_s}
                for r in records
            ]
        )
        return
    rows = [(r.id, r.tenant, r.role, r.priority, _day(r.created_unix_s)) for r in records]
    output.print_table(("ID", "TENANT", "ROLE", "CLASS", "CREATED"), rows, empty="no keys; `llmos keys add` makes one")


@app.command("rm")
def rm(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the key (`llmos keys ls`).")],
    file: KeysFile = _DEFAULT_FILE,
) -> None:
    """Remove a key; gateways refuse it from their next request on."""
    from llmos.keys import remove_key

    gone = remove_key(file, key_id)
    output.write(f"removed {gone.id} of tenant {gone.tenant}\n")


def _day(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d") if unix_s else "-"
