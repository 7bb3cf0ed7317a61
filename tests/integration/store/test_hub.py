"""Importing from a hub, over real HTTP on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llmos.errors import SourceError
from llmos.store import Manifest, Store, import_model
from llmos.store.progress import Silent
from tests.fakes.hub import COMMIT, Hub, serving
from tests.fakes.models import model_files
from tests.fakes.store import Recorder


@pytest.fixture
def hub() -> Iterator[Hub]:
    extra = {"README.md": b"hello", "onnx/model.onnx": b"x", "pytorch_model.bin": b"pickle", "run.py": b"print()"}
    repositories = {"tiny/Model-1": {**model_files(), **extra}}
    with serving(Hub(repositories=repositories, card={"license": "mit"})) as running:
        yield running


def import_from(hub: Hub, tmp_path: Path, source: str = "hf:tiny/Model-1") -> tuple[Store, Manifest]:
    store = Store(tmp_path / "store")
    return store, import_model(store, source, environ={"HF_ENDPOINT": hub.endpoint})


def test_a_repository_becomes_a_version(hub: Hub, tmp_path: Path) -> None:
    store, entry = import_from(hub, tmp_path)
    assert (entry.name, entry.license, entry.source) == ("model-1", "mit", "hf:tiny/Model-1")
    assert {file.path for file in entry.files} == set(model_files())
    store.verify(entry)
    assert not [asked for asked in hub.asked if any(word in asked for word in ("README", ".bin", ".onnx", ".py"))]


def test_a_revision_is_pinned_to_its_commit(hub: Hub, tmp_path: Path) -> None:
    import_from(hub, tmp_path, f"hf:tiny/Model-1@{COMMIT}")
    assert all(f"/resolve/{COMMIT}/" in asked for asked in hub.asked if "/resolve/" in asked)
    assert any(asked.startswith(f"GET /api/models/tiny/Model-1/revision/{COMMIT}") for asked in hub.asked)


def test_progress_counts_every_byte(hub: Hub, tmp_path: Path) -> None:
    progress = Recorder()
    import_model(Store(tmp_path / "s"), "hf:tiny/Model-1", progress=progress, environ={"HF_ENDPOINT": hub.endpoint})
    assert ("downloading tiny/Model-1", sum(map(len, model_files().values()))) in progress.stages
    assert progress.complete()


@pytest.mark.parametrize("source", ["hf:tiny/absent", "hf:tiny/Model-1@absent", "hf:", "hf:a/b/c", "hf:../../etc"])
def test_what_the_hub_does_not_have_is_one_clear_error(hub: Hub, tmp_path: Path, source: str) -> None:
    with pytest.raises(SourceError) as caught:
        import_from(hub, tmp_path, source)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"pytorch_model.bin": b"x", "config.json": b"{}"}, "pickle"),
        ({"a.gguf": b"x", "b.gguf": b"x"}, "2 GGUF files"),
        ({"README.md": b"x"}, "neither safetensors nor GGUF"),
    ],
)
def test_a_repository_without_a_clear_model_is_refused_unread(
    hub: Hub, tmp_path: Path, files: dict[str, bytes], says: str
) -> None:
    hub.repositories["tiny/Model-1"] = files
    with pytest.raises(SourceError, match=says):
        import_from(hub, tmp_path)
    assert not [asked for asked in hub.asked if "/resolve/" in asked]


def test_no_hub_at_all_is_one_clear_error(tmp_path: Path) -> None:
    with serving(Hub()) as gone:
        endpoint = gone.endpoint
    with pytest.raises(SourceError, match="The hub gave no tiny/Model-1"):
        import_model(Store(tmp_path / "s"), "hf:tiny/Model-1", environ={"HF_ENDPOINT": endpoint})


def test_a_broken_download_is_completed(hub: Hub, tmp_path: Path) -> None:
    hub.cut_after = {"model.safetensors": 100}
    store, entry = import_from(hub, tmp_path)
    store.verify(entry)
    assert hub.cut_after == {}


class Interrupting(Silent):
    """Ctrl-C once weights arrive."""

    def __init__(self, after: int) -> None:
        self._left = after

    def advance(self, amount: int) -> None:
        self._left -= amount
        if self._left < 0:
            raise KeyboardInterrupt


def test_an_interrupted_import_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    before_weights = sum(len(data) for name, data in model_files().items() if name != "model.safetensors")
    store = Store(tmp_path / "store")
    environ = {"HF_ENDPOINT": hub.endpoint}
    with pytest.raises(KeyboardInterrupt):
        import_model(store, "hf:tiny/Model-1", progress=Interrupting(before_weights), environ=environ)
    assert store.list() == []
    store.verify(import_model(store, "hf:tiny/Model-1", environ=environ))
    fetched = [asked.rpartition("/")[2] for asked in hub.asked if asked.startswith("GET") and "/resolve/" in asked]
    assert sorted(set(fetched)) == sorted(model_files())
    assert [name for name in model_files() if fetched.count(name) > 1] == ["model.safetensors"]
