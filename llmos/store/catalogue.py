"""Names, versions and import keys of one store, as the files say at the moment of asking."""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec

from llmos.errors import ModelNotFound, StoreCorrupt
from llmos.store import files, manifest
from llmos.store.layout import NAME, Layout
from llmos.store.manifest import Manifest
from llmos.store.precision import PlanRecord, content_version

SHORTEST_VERSION = 8


class Pointer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Content of a name or of an import key."""

    version: str


class Catalogue:
    """Reads at any time; the methods that write are called under the store's lock."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def names(self) -> list[str]:
        return sorted(path.stem for path in self._layout.names.glob("[!.]*.json"))

    def versions(self) -> list[str]:
        return sorted(path.stem for path in self._layout.manifests.glob("[!.]*.json"))

    def target(self, name: str) -> str | None:
        """The version that a name points to, or None."""
        return self._read(self._layout.name(name))

    def imported(self, key: str) -> str | None:
        """The version that an import key points to; None if there is none, or the key is damaged."""
        return self._imported(self._layout.imported(key))

    def manifest(self, version: str) -> Manifest | None:
        """The manifest of a version in full, or None. Raises `StoreCorrupt` if it does not match its hash."""
        try:
            data = self._layout.manifest(version).read_bytes()
        except FileNotFoundError:
            return None
        return manifest.decode(data, version)

    def plan(self, entry: Manifest) -> PlanRecord | None:
        """The plan of a version; None if there is none, or it is damaged or another model's."""
        try:
            found = msgspec.json.decode(self._layout.plan(entry.version).read_bytes(), type=PlanRecord)
        except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
            return None  # it is measured again, and gives the same
        fits = found.version == entry.version and len(found.plan.layers) == entry.layers
        return found if fits else None

    def add_plan(self, record: PlanRecord) -> None:
        """Write the plan of a version that exists, once and for all."""
        text = msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"
        files.write_atomic(self._layout.plan(record.version), text)

    def named(self, name: str) -> Manifest | None:
        """The manifest behind a name, or None."""
        target = self.target(name) if NAME.fullmatch(name) else None
        found = self.manifest(target) if target else None
        return msgspec.structs.replace(found, name=name) if found is not None else None

    def everything(self) -> list[Manifest]:
        """One manifest per name, sorted by name; then the versions without a name."""
        named = [found for name in self.names() if (found := self.named(name)) is not None]
        seen = {entry.version for entry in named}
        rest = [self.manifest(version) for version in self.versions() if version not in seen]
        return named + [entry for entry in rest if entry is not None]

    def locate(self, name_or_version: str) -> tuple[str, str]:
        """Name ("" if none) and version of what is meant, without reading its manifest. Raises `ModelNotFound`.

        Accepts a name, a version with or without its plan, or the first 8 or more digits of a version.
        """
        if NAME.fullmatch(name_or_version) and (target := self.target(name_or_version)) is not None:
            return name_or_version, target
        digits = content_version(name_or_version)
        fits = [version for version in self.versions() if version.startswith(digits)]
        if len(digits) < SHORTEST_VERSION or not fits:
            raise self._unknown(name_or_version)
        if len(fits) > 1:
            raise ModelNotFound(f"'{name_or_version}' fits {len(fits)} versions; give more digits.")
        return next((name for name in self.names() if self.target(name) == fits[0]), ""), fits[0]

    def resolve(self, name_or_version: str) -> Manifest:
        """The manifest of what `locate` finds. Raises `ModelNotFound`."""
        name, version = self.locate(name_or_version)
        entry = self.manifest(version)
        if entry is None:
            raise self._unknown(name_or_version)
        return msgspec.structs.replace(entry, name=name)

    def readable(self, version: str) -> Manifest | None:
        """The manifest of a version, or None if there is none or it is damaged."""
        with contextlib.suppress(StoreCorrupt):  # the caller replaces it
            return self.manifest(version)
        return None

    def add(self, entry: Manifest) -> None:
        """Write the manifest; the provenance of the first import stays."""
        if self.readable(entry.version) is None:
            files.write_atomic(self._layout.manifest(entry.version), manifest.encode(entry))

    def drop(self, name_or_version: str) -> None:
        """Forget a name, and its version if no other name points to it; or a version with all its names.

        Raises `ModelNotFound`.
        """
        name, version = self.locate(name_or_version)
        names = [other for other in self.names() if self.target(other) == version]
        doomed = [name] if name == name_or_version else names
        for other in doomed:
            self._layout.name(other).unlink(missing_ok=True)
        if set(names) <= set(doomed):
            self._layout.manifest(version).unlink(missing_ok=True)

    def point_name(self, name: str, version: str) -> None:
        self._write(self._layout.name(name), version)

    def point_import(self, key: str, version: str) -> None:
        self._write(self._layout.imported(key), version)

    def collect(self) -> set[str]:
        """Delete import keys and plans of versions that are gone. Returns the hashes of all blobs referred to."""
        versions = set(self.versions())
        for path in list(self._layout.imports.glob("[!.]*.json")):
            if self._imported(path) not in versions:
                path.unlink()
        for path in list(self._layout.plans.glob("[!.]*.json")):
            if path.stem not in versions:
                path.unlink()
        entries = [self.manifest(version) for version in versions]
        return {file.sha256 for entry in entries if entry is not None for file in entry.files}

    def _unknown(self, asked: str) -> ModelNotFound:
        known = ", ".join(self.names()) or "nothing yet"
        return ModelNotFound(
            f"The model store has no '{asked[:96]}'. It has: {known}. `llmos models import` adds a model."
        )

    def _imported(self, path: Path) -> str | None:
        with contextlib.suppress(StoreCorrupt):  # it only saves a conversion: the next import writes it anew
            return self._read(path)
        return None

    def _write(self, path: Path, version: str) -> None:
        files.write_atomic(path, msgspec.json.encode(Pointer(version)))

    def _read(self, path: Path) -> str | None:
        try:
            return msgspec.json.decode(path.read_bytes(), type=Pointer).version
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError as error:
            raise StoreCorrupt(
                f"The pointer {path.stem} of the model store cannot be read; import it again."
            ) from error
