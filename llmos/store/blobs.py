"""Contents by hash: whole or absent, read-only, shared by every version that holds the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from llmos.errors import ModelNotFound
from llmos.store import files
from llmos.store.layout import DIGEST, Layout

Advance = Callable[[int], None]


class Blobs:
    """The blobs of one store. `add` and `collect` are called under the store's lock, the rest at any time."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def path(self, sha256: str) -> Path:
        """Where the blob lies. Raises `ModelNotFound` if the store does not hold it."""
        path = self._layout.blob(sha256)
        if not path.is_file():
            raise ModelNotFound(f"The model store does not hold the blob {sha256[:12]}.")
        return path

    def open(self, sha256: str) -> BinaryIO:
        """The blob, open for reading; the caller closes it. Stays readable if the blob is collected meanwhile."""
        return self.path(sha256).open("rb")

    def read(self, sha256: str) -> Iterator[bytes]:
        """The blob in pieces of at most 1 MiB."""
        return files.read_chunks(self.path(sha256))

    def size(self, sha256: str) -> int | None:
        """Bytes, or None if the store does not hold the blob."""
        path = self._layout.blob(sha256)
        return path.stat().st_size if path.is_file() else None

    def matches(self, sha256: str, advance: Advance) -> bool:
        """Whether the blob exists and hashes to its name; reads all of it."""
        path = self._layout.blob(sha256)
        return path.is_file() and files.sha256_of(files.read_chunks(path, advance))[0] == sha256

    def add(self, source: Path, sha256: str) -> bool:
        """Take over the content of `source`, which the caller hashed. Returns whether that replaced a damaged blob."""
        target = self._layout.blob(sha256)
        existed = target.is_file()
        if existed and self.matches(sha256, lambda _: None):
            return False
        files.place(source, target)
        target.chmod(0o444)
        return existed

    def collect(self, live: Collection[str]) -> int:
        """Delete every blob not in `live` and what interrupted writers left. Returns the bytes freed."""
        freed = 0
        for path in list(self._layout.blobs.glob("*/*")):
            if path.is_dir():
                files.discard(path)
            elif path.name not in live or not DIGEST.fullmatch(path.name):
                freed += path.stat().st_size
                path.unlink()
        return freed
