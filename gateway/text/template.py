"""Chat templates: the conversation as the one text that the model was trained to continue.

Templates are Jinja, rendered as transformers' `apply_chat_template` does, in a sandbox that can't change what it is
given.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, NoReturn, Protocol

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gateway.types import Turn
from llmos.errors import InvalidRequest, UnsupportedFeature

_MAX_REASON = 200
_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template may raise: everything that its expressions can do wrong inside the sandbox."""


class _Generation(Extension):
    """`{% generation %}`, with which templates mark for training what the assistant said; here it is what it holds."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's way to declare it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class ChatTemplate(Protocol):
    """Turns a conversation into a prompt that ends where the assistant's answer begins."""

    def render(self, turns: Sequence[Turn]) -> str:
        """The prompt. Raises InvalidRequest if the template refuses the conversation."""
        ...


class EchoTemplate:
    """The template of echo models: a line `role: content` per turn, then `assistant: `."""

    def render(self, turns: Sequence[Turn]) -> str:
        """See `ChatTemplate`."""
        return "".join(f"{turn.role}: {turn.content}\n" for turn in turns) + "assistant: "


class JinjaTemplate:
    """A model's own template. `now` is the local time that `strftime_now` formats."""

    def __init__(
        self, source: str, *, bos_token: str = "", eos_token: str = "", now: Callable[[], datetime] = datetime.now
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda pattern: now().strftime(pattern)
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError, ValueError) as error:
            raise UnsupportedFeature("The model's chat template is broken; use completions.", param="model") from error
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}

    def render(self, turns: Sequence[Turn]) -> str:
        """See `ChatTemplate`."""
        messages = [_message(turn) for turn in turns]
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._tokens
            )
        except _FAULTS as error:
            reason = str(error)[:_MAX_REASON]
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {reason}", param="messages"
            ) from error


def _message(turn: Turn) -> dict[str, str]:
    message = {"role": turn.role, "content": turn.content}
    if turn.name:
        message["name"] = turn.name
    return message


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which would reach the model.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
