"""Files that are either whole or absent: temporary name, fsync, rename."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

CHUNK_BYTES = 1 << 20


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, durably. Readers see the old content or the new, never a part."""
    write_stream(path, iter([data]))


def write_stream(path: Path, chunks: Iterable[bytes]) -> tuple[str, int]:
    """Write the chunks to `path` (created or replaced as a whole) and return their SHA-256 and size.

    If the chunks raise, nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".incoming-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                size += len(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return digest.hexdigest(), size


def read_chunks(path: Path, advance: Callable[[int], None] = lambda _: None) -> Iterator[bytes]:
    """The file in pieces of at most 1 MiB; `advance` gets the size of each."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            advance(len(chunk))
            yield chunk


def sha256_of(chunks: Iterable[bytes]) -> tuple[str, int]:
    """SHA-256 in hex, and the number of bytes."""
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        size += len(chunk)
    return digest.hexdigest(), size


def place(source: Path, target: Path) -> None:
    """Make `target` hold what `source` holds, at once: a hard link where the file system has them, else a copy.

    Replaces a `target` that exists. `source` stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=".incoming-"))
    try:
        link_or_copy(source, folder / target.name)
        with (folder / target.name).open("rb") as file:
            os.fsync(file.fileno())
        (folder / target.name).replace(target)
    finally:
        discard(folder)
    sync_folder(target.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard link `target` to `source`; copy where links are refused (another file system, or one without them)."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut, where the file system can."""
    with contextlib.suppress(OSError):  # some file systems refuse to sync a folder; the rename stays atomic
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def discard(path: Path) -> None:
    """Delete a folder and what is in it; one that is absent is fine."""
    with contextlib.suppress(FileNotFoundError):  # absent, or another process deletes it at the same time
        shutil.rmtree(path)
