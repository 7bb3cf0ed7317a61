"""`llmos generate`: one prompt, one answer."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from llmos.cli import output
from llmos.cli.flags import (
    AsJson,
    Choice,
    DataDir,
    JsonSchema,
    MaxTokens,
    Regex,
    Seed,
    ServedModel,
    Temperature,
    Timeout,
)

if TYPE_CHECKING:
    from llmos.cli.answering import Answer
    from llmos.cli.connection import Connection, Target
    from llmos.cli.prompting import Event, Settings
    from llmos.v1 import inference_pb2 as pb

Prompt = Annotated[str, typer.Argument(help="What to ask; `-` reads it from standard input.")]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the text as it is instead of answering it in a chat.")]
Stream = Annotated[bool, typer.Option("--stream/--no-stream", help="Show the answer while it is generated.")]


def generate(
    prompt: Prompt,
    model: ServedModel = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    choice: Choice = None,
    raw: Raw = False,
    stream: Stream = True,
    timeout: Timeout = 600.0,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Ask a served model."""
    from llmos.cli.connection import find_target
    from llmos.cli.prompting import Settings, read_constraint

    text = sys.stdin.read() if prompt == "-" else prompt
    settings = Settings(max_tokens, temperature, seed, timeout, read_constraint(json_schema, regex, choice))
    find = partial(find_target, data_dir)
    answer = asyncio.run(_ask(lambda lost: find(avoid=lost), model, text, settings, raw, stream and not as_json))
    if as_json:
        output.print_json(answer.as_json())
    elif not stream:
        output.write(f"{answer.text}\n")


async def _ask(
    find: Callable[[str], Target], model: str, text: str, settings: Settings, raw: bool, show: bool
) -> Answer:
    from llmos.cli import prompting
    from llmos.cli.answering import read_answer

    async def ask(fleet: Connection, settings: Settings, resume: pb.Resume | None) -> AsyncGenerator[Event, None]:
        served = await prompting.choose_model(fleet, model)
        if raw or "chat" not in served.capabilities:
            return prompting.stream_completion(fleet, served.name, text, settings, resume)
        return prompting.stream_chat(fleet, served.name, [prompting.user_says(text)], settings, resume)

    return await read_answer(find, ask, settings, show=show)
