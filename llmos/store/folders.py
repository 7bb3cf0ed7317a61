"""Folders that transformers can load, made of links to blobs."""

from __future__ import annotations

import tempfile
from pathlib import Path

from llmos.store import files
from llmos.store.blobs import Blobs
from llmos.store.manifest import Manifest


def laid_out(entry: Manifest, target: Path) -> bool:
    """Whether every file of the version is in `target`, in its size, and nothing is missing."""
    return all(_size(target / file.path) == file.size for file in entry.files)


def lay_out(entry: Manifest, target: Path, blobs: Blobs) -> None:
    """Put links to all blobs of the version into `target`, replacing what is there. Raises `ModelNotFound`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=".incoming-"))
    try:
        for file in entry.files:
            files.link_or_copy(blobs.path(file.sha256), folder / file.path)
        folder.chmod(0o755)
        files.discard(target)
        folder.rename(target)
    except BaseException:
        files.discard(folder)
        raise
    files.sync_folder(target.parent)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
