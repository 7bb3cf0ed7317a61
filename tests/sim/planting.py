"""How a bug is planted at run time, and taken out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from scheduler import core

Plant = Callable[[ExitStack], None]
"""Patches the code for as long as the stack is open."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One bug."""

    name: str
    what: str
    plant: Plant
    dense: bool = False
    """What it takes to show it hardly ever comes together in schedules of a few faults."""


MUTANTS: dict[str, Mutant] = {}


def mutant(what: str, *, dense: bool = False) -> Callable[[Plant], Plant]:
    """Enter a bug under its function's name."""

    def enter(plant: Plant) -> Plant:
        name = plant.__name__.strip("_").replace("_", "-")
        MUTANTS[name] = Mutant(name, what, plant, dense)
        return plant

    return enter


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The code with one bug in it; with none for an empty name."""
    with ExitStack() as stack:
        if name:
            MUTANTS[name].plant(stack)
        yield


def put(stack: ExitStack, owner: Any, name: str, replacement: Any) -> None:
    """Replace an attribute."""
    stack.enter_context(mock.patch.object(owner, name, replacement))


def handler(stack: ExitStack, event: type, replacement: Any) -> None:
    """Replace what the core does on an event."""
    stack.enter_context(mock.patch.dict(core._HANDLERS, {event: replacement}))


def nothing(*_: Any, **__: Any) -> None:
    """What a forgotten call does."""
