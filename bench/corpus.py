"""Text that every Python brings along: the docstrings of the standard library, in a fixed order.

The precision plan is chosen on the reference's chapters (`worker.quality.corpus`); what is measured here is other text.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer

MODULES = (
    *("argparse", "base64", "bisect", "calendar", "collections", "contextlib", "csv", "datetime", "decimal", "difflib"),
    *("fractions", "functools", "heapq", "imaplib", "inspect", "ipaddress", "json", "logging", "optparse", "pathlib"),
    *("random", "shutil", "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading"),
    *("unittest.case", "unittest.mock", "urllib.parse", "urllib.request", "zipfile"),
)
_DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def text() -> str:
    """The whole corpus; the same for one version of Python."""
    return "\n\n".join(doc for name in MODULES for doc in docstrings(name) if doc)


def docstrings(module_name: str) -> Iterator[str]:
    """Docstrings in a module's source: its own, then those of its public classes, functions and methods.

    From the source, because some libraries put functions of their own into these modules.
    """
    spec = importlib.util.find_spec(module_name)
    if spec is None or not spec.origin:
        raise ModuleNotFoundError(f"this Python has no source of {module_name}")
    tree = ast.parse(Path(spec.origin).read_text("utf-8"))
    yield ast.get_docstring(tree) or ""
    for one in tree.body:
        members = one.body if isinstance(one, ast.ClassDef) else []
        for documented in (one, *members):
            if isinstance(documented, _DOCUMENTED) and not documented.name.startswith("_"):
                yield ast.get_docstring(documented) or ""


def windows(ids: Sequence[int], count: int, length: int, first: Sequence[int] = ()) -> list[list[int]]:
    """`count` pieces of `length` tokens, evenly spread over `ids`; each begins with `first` (a begin-of-text token).

    Raises ValueError if `ids` are too few for pieces that do not overlap.
    """
    body = length - len(first)
    if count < 1 or body < 1 or len(ids) < count * body:
        raise ValueError(f"{len(ids)} tokens do not hold {count} windows of {length}")
    gap = len(ids) // count
    return [[*first, *ids[n * gap : n * gap + body]] for n in range(count)]


class Texts:
    """The corpus in a model's tokens."""

    def __init__(self, folder: Path) -> None:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.ids: list[int] = tokenizer.encode(text(), add_special_tokens=False).ids
        self.first: list[int] = tokenizer.encode("").ids
        """What the tokenizer begins every text with."""

    def windows(self, count: int, length: int) -> list[list[int]]:
        """See `windows`."""
        return windows(self.ids, count, length, self.first)
