"""Files are whole or absent."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmos.store import files


def broken() -> Iterator[bytes]:
    yield b"half"
    raise ConnectionError("gone")


def test_a_broken_stream_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "blob"
    target.write_bytes(b"old")
    with pytest.raises(ConnectionError):
        files.write_stream(target, broken())
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_broken_stream_leaves_nothing_new(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError):
        files.write_stream(tmp_path / "blob", broken())
    assert list(tmp_path.iterdir()) == []


def test_a_stream_is_hashed_as_it_is_written(tmp_path: Path) -> None:
    written = files.write_stream(tmp_path / "deep" / "blob", iter([b"a", b"b"]))
    assert (tmp_path / "deep" / "blob").read_bytes() == b"ab"
    assert written == files.sha256_of([b"ab"])


def test_placing_replaces_and_keeps_the_source(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "folder" / "target"
    source.write_bytes(b"new")
    target.parent.mkdir()
    target.write_bytes(b"old")
    files.place(source, target)
    assert target.read_bytes() == source.read_bytes() == b"new"
    assert list(target.parent.iterdir()) == [target]


def test_placing_a_file_where_it_already_lies_is_fine(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "folder" / "target"
    source.write_bytes(b"new")
    files.place(source, target)
    files.place(source, target)
    assert target.read_bytes() == b"new"
    assert list(target.parent.iterdir()) == [target]


def test_without_hard_links_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "source").write_bytes(b"x")
    files.place(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"x"
    assert (tmp_path / "target").stat().st_nlink == 1


def test_discarding_what_is_absent_is_fine(tmp_path: Path) -> None:
    files.discard(tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    files.discard(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []
