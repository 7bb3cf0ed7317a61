"""Where things lie inside a store, and where the store lies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from llmos.config import environment
from llmos.errors import SourceError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
DIGEST = re.compile(r"[0-9a-f]{64}")


def default_store_path(environ: Mapping[str, str] | None = None) -> Path:
    """`LLMOS_STORE`, or `llmos/store` in the user's cache folder (`XDG_CACHE_HOME`, by default ~/.cache)."""
    variables = environment() if environ is None else environ
    if chosen := variables.get("LLMOS_STORE"):
        return Path(chosen).expanduser().absolute()
    cache = Path(variables.get("XDG_CACHE_HOME", ""))
    # The XDG base directory specification has relative paths ignored.
    return (cache if cache.is_absolute() else Path("~/.cache").expanduser()) / "llmos" / "store"


def check_name(name: str) -> str:
    """A model name that is safe as a file name. Raises `SourceError`."""
    if not NAME.fullmatch(name):
        raise SourceError(
            f"'{name[:96]}' cannot be a model name: use at most 96 letters, digits, '.', '_' and '-', "
            "beginning with a letter or a digit."
        )
    return name


class Layout:
    """Paths of one store.

    blobs/sha256/ab/abcd...   contents, read-only
    manifests/<version>.json  what a version consists of
    plans/<version>.json      in which precision its matrices are computed
    names/<name>.json         pointers to versions
    imports/<key>.json        what has been imported or converted already
    models/<version>/         folders of links that transformers can load
    staging/<key>/            imports under way or interrupted
    locks/<key>               files for flock; never deleted
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.blobs = root / "blobs" / "sha256"
        self.manifests = root / "manifests"
        self.plans = root / "plans"
        self.names = root / "names"
        self.imports = root / "imports"
        self.models = root / "models"
        self.staging = root / "staging"
        self.locks = root / "locks"

    def blob(self, sha256: str) -> Path:
        """Path of a blob. Raises ValueError if `sha256` is not 64 hex digits, so that no path can be smuggled in."""
        if not DIGEST.fullmatch(sha256):
            raise ValueError(f"not a SHA-256 in hex: {sha256[:80]!r}")
        return self.blobs / sha256[:2] / sha256

    def manifest(self, version: str) -> Path:
        return self.manifests / f"{version}.json"

    def plan(self, version: str) -> Path:
        return self.plans / f"{version}.json"

    def name(self, name: str) -> Path:
        return self.names / f"{name}.json"

    def imported(self, key: str) -> Path:
        return self.imports / f"{key}.json"

    def model(self, version: str) -> Path:
        return self.models / version

    def stage(self, key: str) -> Path:
        return self.staging / key

    def lock(self, key: str) -> Path:
        return self.locks / key
