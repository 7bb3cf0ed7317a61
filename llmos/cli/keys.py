"""`llmos keys`: make, list and remove API keys."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llmos.cli import output
from llmos.cli.flags import AsJson

if TYPE_CHECKING:
    from llmos.keys import KeyRecord

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

KeysFile = Annotated[
    Path, typer.Option("--file", "-f", help="The keys file; give the same to `python -m gateway --keys-file`.")
]
_DEFAULT_FILE = Path("llmos-keys.json")
Weight = Annotated[
    int | None,
    typer.Option("--weight", min=1, max=1000, help="The tenant's share, beside others' weights."),
]
MaxRequests = Annotated[
    int | None,
    typer.Option("--max-requests", min=0, max=2**32 - 1, help="Most requests of the tenant that wait or run; 0: any."),
]
TokensPerMinute = Annotated[
    int | None,
    typer.Option(
        "--tokens-per-minute", min=0, max=2**32 - 1, help="Most tokens of the tenant, prompts included; 0: any."
    ),
]


@app.command("add")
def add(
    tenant: Annotated[str, typer.Option("--tenant", help="Who is charged for what the key asks.")],
    role: Annotated[Literal["user", "operator"], typer.Option("--role", help="Operators may kill and drain.")] = "user",
    priority: Annotated[
        Literal["interactive", "standard", "batch"], typer.Option("--class", help="Class of service.")
    ] = "standard",
    weight: Weight = None,
    max_requests: MaxRequests = None,
    tokens_per_minute: TokensPerMinute = None,
    file: KeysFile = _DEFAULT_FILE,
    as_json: AsJson = False,
) -> None:
    """Make a key. It is shown this once; the file keeps a salted hash.

    Weight and limits are the tenant's: they hold for all its keys, and a further key takes them over.
    """
    from llmos.keys import add_key
    from llmos.tenants import LimitsChange

    limits = LimitsChange(weight, max_requests, tokens_per_minute)
    key, record = add_key(file, tenant, role=role, priority=priority, limits=limits, now_unix_s=int(time.time()))
    if as_json:
        output.print_json({"key": key} | _record_json(record))
        return
    output.note(f"Key {record.id} of tenant {tenant} ({role}, {priority}), in {file}. Keep it: it is not shown again.")
    output.write(f"{key}\n")


@app.command("set")
def set_(
    tenant: Annotated[str, typer.Argument(help="Name of the tenant (`llmos keys ls`).")],
    weight: Weight = None,
    max_requests: MaxRequests = None,
    tokens_per_minute: TokensPerMinute = None,
    file: KeysFile = _DEFAULT_FILE,
) -> None:
    """Change a tenant's weight and limits. Gateways obey from the tenant's next request on."""
    from llmos.keys import set_limits
    from llmos.tenants import LimitsChange

    if weight is max_requests is tokens_per_minute is None:
        raise typer.BadParameter("give --weight, --max-requests or --tokens-per-minute")
    now = set_limits(file, tenant, LimitsChange(weight, max_requests, tokens_per_minute))
    limits = f"{_limit(now.max_requests)} requests, {_limit(now.tokens_per_minute)} tokens per minute"
    output.write(f"{tenant}: weight {now.weight}, {limits}\n")


@app.command("ls")
def ls(file: KeysFile = _DEFAULT_FILE, as_json: AsJson = False) -> None:
    """List the keys of a file: whom they name, never the keys themselves."""
    from llmos.keys import read_keys

    records = read_keys(file)
    if as_json:
        output.print_json([_record_json(record) for record in records])
        return
    columns = ("ID", "TENANT", "ROLE", "CLASS", "WEIGHT", "REQUESTS", "TOKENS/MIN", "CREATED")
    output.print_table(columns, [_row(record) for record in records], empty="no keys; `llmos keys add` makes one")


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


def _row(record: KeyRecord) -> tuple[str, ...]:
    limits = (str(record.weight), _limit(record.max_requests), _limit(record.tokens_per_minute))
    return (record.id, record.tenant, record.role, record.priority, *limits, _day(record.created_unix_s))


def _record_json(record: KeyRecord) -> dict[str, object]:
    return {
        "id": record.id,
        "tenant": record.tenant,
        "role": record.role,
        "class": record.priority,
        "weight": record.weight,
        "max_requests": record.max_requests,
        "tokens_per_minute": record.tokens_per_minute,
        "created": record.created_unix_s,
    }


def _limit(limit: int) -> str:
    return str(limit) if limit else "any"
