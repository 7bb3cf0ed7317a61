"""`llmos chat`: a conversation at the terminal, or one turn per line of a pipe."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmos.cli import output
from llmos.cli.flags import Choice, DataDir, JsonSchema, MaxTokens, Regex, Seed, ServedModel, Temperature, Timeout

if TYPE_CHECKING:
    from llmos.cli.connection import Connection, Target
    from llmos.cli.prompting import Event, Settings
    from llmos.v1 import inference_pb2 as pb

HELP = "/clear forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."

System = Annotated[str, typer.Option("--system", help="Instructions that frame the conversation.")]


def chat(
    model: ServedModel = "",
    system: System = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    choice: Choice = None,
    timeout: Timeout = 600.0,
    data_dir: DataDir = None,
) -> None:
    """Talk to a served model. /clear forgets the conversation, /exit leaves."""
    from llmos.cli.connection import find_target
    from llmos.cli.prompting import Settings, read_constraint

    settings = Settings(max_tokens, temperature, seed, timeout, read_constraint(json_schema, regex, choice))
    find = partial(find_target, data_dir)
    conversation = Conversation(lambda lost: find(avoid=lost), model, settings, system)
    with asyncio.Runner() as runner:
        name = runner.run(conversation.choose())
        interactive = sys.stdin.isatty()
        if interactive:
            output.note(f"{name}. {HELP}")
        _converse(conversation, runner, interactive)


def _converse(conversation: Conversation, runner: asyncio.Runner, interactive: bool) -> None:
    from llmos.errors import LlmosError

    while (line := _read_line(interactive)) is not None:
        text = line.strip()
        if text in ("/exit", "/quit"):
            return
        if text == "/clear":
            conversation.clear()
        elif text.startswith("/") and interactive:
            output.note(HELP)
        elif text:
            try:
                if runner.run(_interrupted(conversation.turn(text))):
                    if not interactive:
                        raise KeyboardInterrupt
                    output.write("\n")
            except LlmosError as problem:
                if not interactive:
                    raise
                output.error(problem.message)


async def _interrupted(turn: Coroutine[Any, Any, None]) -> bool:
    """Whether Ctrl-C ended a turn.

    The event loop's own handler wakes it. With Python's, a signal that comes just before the loop begins to wait is
    noticed only when something else happens: with a model that is silent, not at all.
    """
    loop, stopped = asyncio.get_running_loop(), False
    running = asyncio.ensure_future(turn)

    def stop() -> None:
        nonlocal stopped
        stopped = True
        running.cancel()

    loop.add_signal_handler(signal.SIGINT, stop)
    try:
        await running
    except asyncio.CancelledError:
        if not stopped:
            raise
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    return stopped


def _read_line(interactive: bool) -> str | None:
    """The next line; None at the end of the input."""
    if not interactive:
        return sys.stdin.readline() or None
    # Line editing and recall come with the import; builds of Python without it still read lines.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    try:
        return input("> ")
    except EOFError:
        output.write("\n")
    except KeyboardInterrupt:
        output.write("\n")
        return ""
    return None


class Conversation:
    """The turns so far. A turn that fails or is interrupted leaves no trace in them."""

    def __init__(self, find: Callable[[str], Target], model: str, settings: Settings, system: str) -> None:
        """`find` says where to ask, given the address that was lost last."""
        self._find = find
        self._model = model
        self._settings = settings
        self._system = system
        self._messages: list[pb.Message] = []

    async def choose(self) -> str:
        """Settle on a model. Raises UnsupportedFeature if it cannot chat."""
        from llmos.cli import prompting
        from llmos.cli.connection import connect
        from llmos.errors import UnsupportedFeature

        async with connect(self._find("")) as fleet:
            served = await prompting.choose_model(fleet, self._model)
        if "chat" not in served.capabilities:
            raise UnsupportedFeature(f"{served.name} cannot chat: `llmos generate` continues a text with it")
        self._model = served.name
        return self._model

    def clear(self) -> None:
        """Forget all turns."""
        self._messages.clear()

    async def turn(self, text: str) -> None:
        """Say `text` and write the answer as it comes."""
        from llmos.cli import prompting
        from llmos.cli.answering import read_answer

        asked = [*self._messages, prompting.user_says(text)]
        messages = [prompting.system_says(self._system), *asked] if self._system else asked

        async def ask(fleet: Connection, settings: Settings, resume: pb.Resume | None) -> AsyncGenerator[Event, None]:
            return prompting.stream_chat(fleet, self._model, messages, settings, resume)

        answer = await read_answer(self._find, ask, self._settings, show=True)
        if not answer.text:
            output.write("\n")
        self._messages = [*asked, prompting.assistant_said(answer.text)]
