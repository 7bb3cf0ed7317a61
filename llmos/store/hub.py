"""Models from a Hugging Face hub, through the client library `huggingface_hub`.

`HF_ENDPOINT` and `HF_TOKEN` mean what they mean there.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from llmos.errors import MissingExtra, SourceError
from llmos.store.encoders import POOLING_FILE
from llmos.store.payload import PICKLES, Bundle, bundle, model_name, of_file, refuse_pickle, stored_name, wanted
from llmos.store.progress import Progress

REPOSITORY = re.compile(r"(?P<repository>[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?)(@(?P<revision>[A-Za-z0-9._/-]+))?")
TIMEOUT_S = 30.0
"""For the hub to answer; a download may take as long as it moves."""


def fetch(place: str, work: Path, progress: Progress, environ: Mapping[str, str]) -> Bundle:
    """The model in `place` (REPOSITORY or REPOSITORY@REVISION), downloaded into `work`.

    What an interrupted import left there is completed. Raises `SourceError`; `MissingExtra` without the library.
    """
    match = REPOSITORY.fullmatch(place)
    if match is None:
        raise SourceError(f"'{place[:96]}' is not a repository: write hf:OWNER/NAME or hf:OWNER/NAME@REVISION.")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise MissingExtra("store", "Importing from a Hugging Face hub")
    from huggingface_hub import errors

    try:
        return _fetch(match["repository"], match["revision"], work, progress, environ)
    except (OSError, errors.HTTPError, errors.HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(f"The hub gave no {place}: {reason[:300]}") from error


def _fetch(repository: str, revision: str | None, work: Path, progress: Progress, environ: Mapping[str, str]) -> Bundle:
    from huggingface_hub import HfApi

    hub = HfApi(endpoint=environ.get("HF_ENDPOINT"), token=environ.get("HF_TOKEN"))
    progress.stage(f"asking for {repository}", None)
    info = hub.model_info(repository, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
    sizes = _choose(repository, {entry.rfilename: entry.size or 0 for entry in info.siblings or ()})
    progress.stage(f"downloading {repository}", sum(sizes.values()))
    for name, size in sizes.items():
        bar = _bar_class(progress)
        hub.hf_hub_download(repository, name, revision=info.sha, local_dir=work, etag_timeout=TIMEOUT_S, tqdm_class=bar)
        progress.advance(max(0, size - bar.seen))
    payloads = [of_file(work / name, stored_name(name) or "") for name in sizes]
    return bundle(payloads, repository, model_name(PurePosixPath(repository).name + ".hub"), _license(info))


def _choose(repository: str, sizes: Mapping[str, int]) -> dict[str, int]:
    """The files to download: those that can be part of a model, in the top folder, and the pooling's configuration."""
    top = {name: size for name, size in sizes.items() if "/" not in name}
    pooling = {name: size for name, size in sizes.items() if name.count("/") == 1 and stored_name(name) == POOLING_FILE}
    chosen = {name: size for name, size in top.items() if wanted(name)}
    safetensors = any(name.endswith(".safetensors") for name in chosen)
    if safetensors:
        return {name: size for name, size in chosen.items() if not name.lower().endswith(".gguf")} | pooling
    ggufs = {name: size for name, size in chosen.items() if name.lower().endswith(".gguf")}
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        raise SourceError(f"{repository} has {len(ggufs)} GGUF files: fetch the one you want and import that file.")
    if pickles := sorted(name for name in top if PurePosixPath(name).suffix.lower() in PICKLES):
        raise refuse_pickle(pickles[0])
    raise SourceError(f"{repository} has neither safetensors nor GGUF files.")


def _license(info: Any) -> str:
    card = getattr(info, "card_data", None)
    said = getattr(card, "license", None)
    return said if isinstance(said, str) else ""


def _bar_class(progress: Progress) -> Any:
    """A class that the client takes for a tqdm bar; counts in `seen` and draws nothing itself."""
    from tqdm import tqdm  # type: ignore[import-untyped]  # has no types

    class Bar(tqdm):  # type: ignore[misc]  # its base is untyped
        seen = 0

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True, "name": None})

        def update(self, n: float | None = 1) -> bool | None:
            type(self).seen += int(n or 0)
            progress.advance(int(n or 0))
            return None

    return Bar
