"""`llmos generate`: one prompt, one answer."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
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
    from llmos.cli.connection import Connection, Target
    from llmos.cli.prompting import Event, Settings
    from llmos.v1 import inference_pb2 as pb

Prompt = Annotated[str, typer.Argument(help="What to ask; `-` reads it from standard input.")]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the text as it is instead of answering it in a chat.")]
Stream = Annotated[bool, typer.Option("--stream/--no-stream", help="Show the answer while it is generated.")]

_TRIES = 3
"""Gateways, or moments, at which a broken stream is taken up in vain."""
_PAUSE_S = 0.3


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
    answer = asyncio.run(_ask(lambda: find_target(data_dir), model, text, settings, raw, show=stream and not as_json))
    if as_json:
        output.print_json(answer.as_json())
    elif not stream:
        output.write(f"{answer.text}\n")


class Answer:
    """Gathers the events of one streamed choice."""

    def __init__(self) -> None:
        self.text = ""
        self._tokens: list[int] = []
        self._start: pb.StreamStart | None = None
        self._finish = ""
        self._usage: pb.Usage | None = None

    def add(self, event: Event) -> str:
        """Take an event in; returns the text that it adds."""
        from llmos.v1 import inference_pb2 as pb

        kind = event.WhichOneof("event")
        if kind == "start":
            self._start = event.start
        elif kind == "usage":
            self._usage = event.usage
        elif kind == "delta":
            if event.delta.finish_reason:
                self._finish = output.enum_name(pb.FinishReason, event.delta.finish_reason)
            self.text += event.delta.text
            self._tokens += event.delta.token_ids
            return event.delta.text
        return ""

    @property
    def held(self) -> int:
        """How many tokens have come."""
        return len(self._tokens)

    def resume(self) -> pb.Resume | None:
        """Where another gateway takes up the stream; None before the first token."""
        from llmos.v1 import inference_pb2 as pb

        if self._start is None or not self._tokens:
            return None
        progress = pb.ChoiceProgress(token_ids=self._tokens, text_chars=len(self.text), finished=bool(self._finish))
        return pb.Resume(request_id=self._start.request_id, choices=[progress])

    def seeded(self, settings: Settings) -> Settings:
        """`settings` with the seed that the gateway drew, which a resumed stream needs."""
        return replace(settings, seed=self._start.seed) if self._start else settings

    def as_json(self) -> dict[str, object]:
        """The whole answer for programs."""
        start, usage = self._start, self._usage
        return {
            "id": start.request_id if start else "",
            "model": start.model if start else "",
            "model_version": start.model_version if start else "",
            "seed": start.seed if start else None,
            "text": self.text,
            "finish_reason": self._finish,
            "usage": {
                "prompt_tokens": usage.prompt_tokens if usage else 0,
                "completion_tokens": usage.completion_tokens if usage else 0,
                "cached_tokens": usage.cached_tokens if usage else 0,
            },
        }


async def _ask(
    find: Callable[[], Target], model: str, text: str, settings: Settings, raw: bool, *, show: bool
) -> Answer:
    """The whole answer. A stream that breaks off goes on at a gateway that lives, unless that brings nothing new."""
    from llmos.errors import Unavailable

    answer = Answer()
    fruitless = 0
    try:
        while True:
            held = answer.held
            try:
                await _stream(find(), model, text, settings, raw, answer, show)
                return answer
            except Unavailable:
                fruitless = 0 if answer.held > held else fruitless + 1
                if not answer.held or fruitless == _TRIES:
                    raise
            await asyncio.sleep(_PAUSE_S)
    finally:
        if show and answer.text:
            # An answer that breaks off ends its line too: what follows is an error, or the shell's prompt.
            output.write("\n")


async def _stream(
    target: Target, model: str, text: str, settings: Settings, raw: bool, answer: Answer, show: bool
) -> None:
    from llmos.cli.connection import connect

    async with connect(target) as fleet, aclosing(await _events(fleet, model, text, settings, raw, answer)) as events:
        with output.waiting("waiting for the model") as answered:
            async for event in events:
                piece = answer.add(event)
                if show and piece:
                    answered()
                    output.write(piece)


async def _events(
    fleet: Connection, model: str, text: str, settings: Settings, raw: bool, answer: Answer
) -> AsyncGenerator[Event, None]:
    from llmos.cli import prompting

    served = await prompting.choose_model(fleet, model)
    resume = answer.resume()
    if resume is not None:
        settings = answer.seeded(settings)
    if raw or "chat" not in served.capabilities:
        return prompting.stream_completion(fleet, served.name, text, settings, resume)
    return prompting.stream_chat(fleet, served.name, [prompting.user_says(text)], settings, resume)
