"""The content-addressed model store: blobs by hash, manifests by version, names that point to versions.

Readers take no lock: everything becomes visible by a rename. Writers that add, point or collect hold one short lock, so
that a collection never takes a blob away from a version that is being added.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from llmos.clock import Clock, SystemClock
from llmos.errors import ModelNotFound, StoreBusy, StoreCorrupt
from llmos.store import files, folders, lock, manifest
from llmos.store.blobs import Advance, Blobs
from llmos.store.catalogue import Catalogue
from llmos.store.layout import Layout, check_name, default_store_path
from llmos.store.manifest import Manifest, ManifestFile
from llmos.store.precision import PlanRecord

LOCK_WAIT_S = 60.0
"""Long enough for another process to link a large model, which is a matter of milliseconds per file."""
IMPORT_WAIT_S = 3600.0
"""How long an import waits for another one of the same source."""

ReadBlob = Callable[[str], Iterable[bytes]]


def _nobody(_: int) -> None:
    """Progress that nobody watches."""


class Store:
    """One store folder, shared by all processes of a user. `path` None: `default_store_path()`."""

    def __init__(
        self, path: Path | None = None, *, clock: Clock | None = None, lock_wait_s: float = LOCK_WAIT_S
    ) -> None:
        self.path = path if path is not None else default_store_path()
        self.clock = clock or SystemClock()
        self._layout = Layout(self.path)
        self._blobs = Blobs(self._layout)
        self._catalogue = Catalogue(self._layout)
        self._lock_wait_s = lock_wait_s

    def list(self) -> list[Manifest]:
        """One manifest per name, sorted by name; versions that no name points to come last, with name ""."""
        return self._catalogue.everything()

    def resolve(self, name_or_version: str) -> Manifest:
        """The manifest of a name, of a version, or of a version's first 8 or more digits. Raises `ModelNotFound`."""
        return self._catalogue.resolve(name_or_version)

    def plan(self, entry: Manifest) -> PlanRecord | None:
        """In which precision the version's matrices are computed, once that is known."""
        return self._catalogue.plan(entry)

    def keep_plan(self, record: PlanRecord) -> None:
        """Store the plan of a version; one that is there stays. Raises `ModelNotFound` if the version is gone."""
        with self._lock():
            entry = self._catalogue.manifest(record.version)
            if entry is None:
                raise ModelNotFound(f"Version {record.version[:12]} was removed meanwhile; import it again.")
            if self._catalogue.plan(entry) is None:
                self._catalogue.add_plan(record)

    def find_import(self, key: str) -> Manifest | None:
        """The version that an earlier import under `key` made, if it is still whole."""
        target = self._catalogue.imported(key)
        found = self._catalogue.readable(target) if target else None
        return found if found is not None and self.whole(found) else None

    def whole(self, entry: Manifest) -> bool:
        """Whether every blob of the version exists in its full size (contents unread)."""
        return all(self._blobs.size(file.sha256) == file.size for file in entry.files)

    def verify(self, entry: Manifest, advance: Advance = _nobody) -> None:
        """Read everything and compare hashes. Raises `StoreCorrupt` naming the files that differ."""
        broken = [file.path for file in entry.files if not self._blobs.matches(file.sha256, advance)]
        if broken:
            raise StoreCorrupt(
                f"{', '.join(broken)} of {entry.name or entry.version[:12]} does not match its hash: "
                "remove the model with `llmos models rm` and import it again."
            )

    def blob_path(self, sha256: str) -> Path:
        """Where the blob lies; read-only. Raises `ModelNotFound` if the store does not hold it."""
        return self._blobs.path(sha256)

    def open_blob(self, sha256: str) -> BinaryIO:
        """The blob, open for reading; the caller closes it. Stays readable if the blob is collected meanwhile."""
        return self._blobs.open(sha256)

    def read_blob(self, sha256: str) -> Iterator[bytes]:
        """The blob in pieces of at most 1 MiB: the sending end of a transfer."""
        return self._blobs.read(sha256)

    def read_file(self, entry: Manifest, path: str) -> bytes:
        """A small file of the version, checked against its hash. Raises `ModelNotFound` or `StoreCorrupt`."""
        listed = entry.file(path)
        if listed is None:
            raise ModelNotFound(f"Version {entry.version[:12]} has no file {path}.")
        data = self._blobs.path(listed.sha256).read_bytes()
        if files.sha256_of([data])[0] != listed.sha256:
            raise StoreCorrupt(f"{path} of version {entry.version[:12]} does not match its hash; import it again.")
        return data

    def materialize(self, entry: Manifest) -> Path:
        """A folder of links to the blobs, laid out as transformers expects; made once, made again if files are missing.

        The files belong to the store: read-only, shared with every version that has the same content.
        """
        target = self._layout.model(entry.version)
        if not folders.laid_out(entry, target):
            with self._lock():
                # Whoever was first may be loading from the folder already.
                if not folders.laid_out(entry, target):
                    folders.lay_out(entry, target, self._blobs)
        return target

    def commit(self, entry: Manifest, folder: Path, *, name: str | None = None, key: str | None = None) -> Manifest:
        """Add a version whose files lie in `folder`, point `name` at it and remember it under `key`.

        `entry` is sealed and was made from these very files. `folder` stays the caller's.
        """
        if name is not None:
            check_name(name)
        with self._lock():
            healed = [self._blobs.add(folder / file.path, file.sha256) for file in entry.files]
            if any(healed):
                files.discard(self._layout.models)
            self._catalogue.add(entry)
            if key is not None:
                self._catalogue.point_import(key, entry.version)
            if name is not None:
                self._catalogue.point_name(name, entry.version)
            return self._catalogue.resolve(name or entry.version)

    def point(self, name: str, entry: Manifest) -> Manifest:
        """Let `name` mean this version. Raises `ModelNotFound` if it was removed meanwhile."""
        check_name(name)
        with self._lock():
            if self._catalogue.manifest(entry.version) is None:
                raise ModelNotFound(f"Version {entry.version[:12]} was removed meanwhile; import it again.")
            self._catalogue.point_name(name, entry.version)
            return self._catalogue.resolve(name)

    def remove(self, name: str) -> int:
        """Remove a name, its version if no other name points to it, and all that nothing refers to any more.

        A version goes with all its names. What interrupted imports left goes too. Returns the bytes of blobs freed.
        Raises `ModelNotFound`.
        """
        with self._lock():
            self._catalogue.drop(name)
            return self._collect()

    def receive(
        self, entry: Manifest, read_blob: ReadBlob, *, name: str | None = None, plan: PlanRecord | None = None
    ) -> Manifest:
        """Add a version from elsewhere: the receiving end of a transfer. An interrupted one goes on with the next file.

        `read_blob(sha256)` yields a blob's bytes, `plan` is what the sender has. Raises `StoreCorrupt` if the
        bytes do not match the hash.
        """
        manifest.decode(manifest.encode(entry), entry.version)
        with self.staging(f"receive-{entry.version}") as work:
            for file in entry.files:
                self._fetch(file, work / file.path, read_blob)
            received = self.commit(entry, work, name=name)
        if plan is not None:
            self.keep_plan(plan)
        return received

    @contextlib.contextmanager
    def staging(self, key: str, wait_s: float = IMPORT_WAIT_S) -> Iterator[Path]:
        """A folder on the store's file system, exclusive under `key`, gone after success.

        After an error or a crash it stays, and the next holder finds what is in it. Raises `StoreBusy` after `wait_s`
        seconds.
        """
        with lock.held(self._layout.lock(key), wait_s, clock=self.clock):
            folder = self._layout.stage(key)
            folder.mkdir(parents=True, exist_ok=True)
            yield folder
            files.discard(folder)

    def _lock(self) -> contextlib.AbstractContextManager[None]:
        return lock.held(self._layout.lock("store"), self._lock_wait_s, clock=self.clock)

    def _fetch(self, file: ManifestFile, target: Path, read_blob: ReadBlob) -> None:
        if target.is_file() and files.sha256_of(files.read_chunks(target))[0] == file.sha256:
            return
        if self._blobs.matches(file.sha256, _nobody):
            files.link_or_copy(self._blobs.path(file.sha256), target)
            return
        arrived, _ = files.write_stream(target, read_blob(file.sha256))
        if arrived != file.sha256:
            target.unlink()
            raise StoreCorrupt(f"{file.path} arrived with the wrong hash; it was not stored.")

    def _collect(self) -> int:
        freed = self._blobs.collect(self._catalogue.collect())
        versions = set(self._catalogue.versions())
        for folder in list(self._layout.models.glob("*")):
            if folder.name not in versions:
                files.discard(folder)
        for folder in list(self._layout.staging.glob("*")):
            with contextlib.suppress(StoreBusy), lock.held(self._layout.lock(folder.name), 0, clock=self.clock):
                files.discard(folder)
        return freed
