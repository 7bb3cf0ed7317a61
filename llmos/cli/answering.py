"""An answer that is read to its end: what breaks off goes on at the next token, here or at another gateway."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from llmos.cli import output

if TYPE_CHECKING:
    from llmos.cli.connection import Connection, Target
    from llmos.cli.prompting import Event, Settings
    from llmos.v1 import inference_pb2 as pb

    Ask = Callable[[Connection, Settings, pb.Resume | None], Awaitable[AsyncGenerator[Event, None]]]
    """Sends the request; with what is given last it goes on from there."""

_PATIENCE_S = 15.0
"""How long a broken stream is taken up in vain: a gateway that is started again needs some seconds."""
_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 1.0


class Answer:
    """Gathers the events of one streamed choice."""

    def __init__(self) -> None:
        self.text = ""
        self.forgotten = False
        """The fleet no longer knows the stream by its id: only the request itself can bring the rest."""
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
    def begun(self) -> bool:
        """The request was accepted: it has an id."""
        return self._start is not None

    @property
    def held(self) -> tuple[int, bool]:
        """How many tokens have come, and whether the end has."""
        return len(self._tokens), bool(self._finish)

    def position(self) -> pb.ResumeStreamRequest:
        """What brings the rest of a stream that has begun, from any gateway."""
        from llmos.v1 import inference_pb2 as pb

        assert self._start is not None
        tokens, finished = self.held
        at = pb.StreamPosition(tokens=tokens, text_chars=len(self.text), finished=finished)
        return pb.ResumeStreamRequest(request_id=self._start.request_id, held=[at])

    def resume(self) -> pb.Resume | None:
        """The same for a fleet that knows nothing of the stream: all tokens. None before the first one."""
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


async def read_answer(find: Callable[[str], Target], ask: Ask, settings: Settings, *, show: bool) -> Answer:
    """The whole answer, written as it comes if `show`. `find` says where to ask; it is told who was lost last.

    Raises what the fleet answers, and Unavailable if a stream that broke off cannot be taken up for a while.
    """
    answer = Answer()
    try:
        await _to_its_end(answer, find, ask, settings, show)
    finally:
        if show and answer.text:
            # An answer that breaks off ends its line too: what follows is an error, or the shell's prompt.
            output.write("\n")
    return answer


async def _to_its_end(answer: Answer, find: Callable[[str], Target], ask: Ask, settings: Settings, show: bool) -> None:
    from llmos.errors import NotFound, Unavailable

    ends_at = time.monotonic() + settings.timeout_s
    tried: set[str] = set()
    lost, held, patient_until, pause_s = "", answer.held, 0.0, _PAUSE_S
    while True:
        target = find(lost)
        left = replace(settings, timeout_s=max(0.001, ends_at - time.monotonic()))
        try:
            await _stream(target, ask, left, answer, show)
            return
        except NotFound:
            if not answer.begun or answer.forgotten:
                raise
            answer.forgotten = True
        except Unavailable:
            now, lost = time.monotonic(), target.address
            if answer.held != held or not patient_until:
                held, patient_until, pause_s = answer.held, now + _PATIENCE_S, _PAUSE_S
            tried.add(lost)
            if now >= patient_until or not (answer.begun or find(lost).address not in tried):
                raise
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


async def _stream(target: Target, ask: Ask, settings: Settings, answer: Answer, show: bool) -> None:
    from llmos.cli.connection import connect

    async with connect(target) as fleet, aclosing(await _events(fleet, ask, settings, answer)) as events:
        with output.waiting("waiting for the model") as answered:
            async for event in events:
                piece = answer.add(event)
                if show and piece:
                    answered()
                    output.write(piece)


async def _events(fleet: Connection, ask: Ask, settings: Settings, answer: Answer) -> AsyncGenerator[Event, None]:
    from llmos.cli import prompting

    if answer.begun and not answer.forgotten:
        return prompting.take_up(fleet, answer.position(), settings)
    return await ask(fleet, answer.seeded(settings), answer.resume())
