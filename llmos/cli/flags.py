"""Flags that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmos.cli.completion import served_models

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Data folder of the fleet; by default the one started last.")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON for programs.")]
ServedModel = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="A served model; may be left out if one is served.", autocompletion=served_models
    ),
]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", min=1, help="Most tokens to generate; by default what the context leaves.")
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", "-t", min=0.0, max=2.0, help="Randomness; 0 is greedy. Default 1.")
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, max=2**64 - 1, help="The same seed gives the same answer.")]
JsonSchema = Annotated[
    Path | None,
    typer.Option("--json-schema", exists=True, dir_okay=False, help="File with a JSON schema for the answer."),
]
Regex = Annotated[str | None, typer.Option("--regex", help="A regular expression that the whole answer matches.")]
Choice = Annotated[
    list[str] | None, typer.Option("--choice", help="A text that the answer may be; repeat it for each of them.")
]
Timeout = Annotated[float, typer.Option("--timeout", min=0.1, help="Most seconds to wait for the whole answer.")]
