"""One conversion per file, two importers at once, and sources that are refused."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from llmos.errors import LlmosError, MissingExtra, SourceError
from llmos.store import DEFAULT_NAME, DEFAULT_SOURCE, Manifest, Store, default, ensure_default, import_model
from llmos.store.conversion import NEEDED, convert
from llmos.store.progress import Silent
from llmos.store.wheel import Wheel
from tests.fakes.models import CONFIG, gguf_header, model_files, write_model, write_wheel
from tests.fakes.store import Converter, Recorder

GGUF = gguf_header({"general.architecture": "llama"}) + b"weights"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def write_gguf(folder: Path, name: str = "tiny.gguf", tail: bytes = b"") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(GGUF + tail)
    return str(folder / name)


def test_another_file_is_another_conversion(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converter = Converter.installed(monkeypatch)
    import_model(store, write_gguf(tmp_path, "a.gguf", b"1"))
    import_model(store, write_gguf(tmp_path, "b.gguf", b"2"))
    assert len(converter.converted) == 2


def test_a_new_converter_converts_again(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converter = Converter.installed(monkeypatch)
    import_model(store, write_gguf(tmp_path))
    monkeypatch.setattr("llmos.store.conversion.CONVERTER_REVISION", 10**6)
    import_model(store, write_gguf(tmp_path))
    assert len(converter.converted) == 2


def test_a_removed_model_is_converted_again(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converter = Converter.installed(monkeypatch)
    import_model(store, write_gguf(tmp_path))
    store.remove("tiny")
    store.verify(import_model(store, write_gguf(tmp_path)))
    assert len(converter.converted) == 2


def test_a_version_with_a_lost_blob_is_converted_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converter = Converter.installed(monkeypatch)
    entry = import_model(store, write_gguf(tmp_path))
    store.blob_path(entry.files[0].sha256).unlink()
    store.verify(import_model(store, write_gguf(tmp_path)))
    assert len(converter.converted) == 2


def test_a_failed_conversion_leaves_nothing_and_can_be_repeated(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise SourceError("no such architecture")

    with monkeypatch.context() as patched:
        Converter.installed(patched, during=fail)
        with pytest.raises(SourceError, match="no such architecture"):
            import_model(store, write_gguf(tmp_path))
    assert store.list() == []
    Converter.installed(monkeypatch)
    store.verify(import_model(store, write_gguf(tmp_path)))


class Waiting(Silent):
    """Sets `reached` when the import says that it waits for another one."""

    def __init__(self) -> None:
        self.reached = threading.Event()

    def stage(self, label: str, total: int | None, *, in_bytes: bool = True) -> None:
        if label.startswith("waiting for another import"):
            self.reached.set()


def test_two_importers_of_the_same_file_convert_it_once(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = Waiting()
    results: list[Manifest] = []
    threads: list[threading.Thread] = []

    def start_the_second() -> None:
        source = write_gguf(tmp_path / "elsewhere", "other.gguf")
        thread = threading.Thread(target=lambda: results.append(import_model(store, source, progress=second)))
        threads.append(thread)
        thread.start()
        assert second.reached.wait(20)

    converter = Converter.installed(monkeypatch, during=start_the_second)
    first = import_model(store, write_gguf(tmp_path))
    threads[0].join(20)
    assert [entry.name for entry in results] == ["other"]
    assert results[0].version == first.version
    assert converter.converted == [GGUF]
    store.verify(first)


def test_a_removal_during_an_import_takes_nothing_from_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_model(store, str(write_model(tmp_path / "twin")), name="twin")
    converter = Converter.installed(monkeypatch, during=lambda: [None, store.remove("twin")][0])
    entry = import_model(store, write_gguf(tmp_path))
    assert converter.converted
    store.verify(entry)
    assert [other.name for other in store.list()] == ["tiny"]


def test_a_folder_is_copied_and_stays_the_users(store: Store, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "My Model")
    (folder / "training_args.bin").write_bytes(b"pickle")
    progress = Recorder()
    entry = import_model(store, str(folder), name="mine", progress=progress)
    assert {file.path for file in entry.files} == set(model_files())
    assert progress.complete()
    (folder / "config.json").write_text("changed by the user")
    store.verify(entry)


def test_an_encoder_brings_how_its_vectors_are_made(store: Store, tmp_path: Path) -> None:
    """From a folder, and from a wheel, in which other files are called config.json too."""
    bert = {"architectures": ["BertModel"], "model_type": "bert", "max_position_embeddings": 64}
    own = {
        "config.json": json.dumps(CONFIG | bert).encode(),
        "modules.json": b'[{"type": "x.Transformer"}, {"type": "x.Pooling"}, {"type": "x.Normalize"}]',
        "1_Pooling/config.json": b'{"pooling_mode_cls_token": true}',
    }
    folder = write_model(tmp_path / "mini", without=("chat_template.jinja",))
    (folder / "1_Pooling").mkdir()
    for name, data in own.items():
        (folder / name).write_bytes(data)
    entry = import_model(store, str(folder))
    assert (entry.capabilities, entry.dimensions, entry.kv_bytes_per_token) == (("embed",), (16,), 0)
    assert (store.materialize(entry) / "pooling.json").read_bytes() == own["1_Pooling/config.json"]
    members = {f"pkg/model/{name}": data for name, data in (model_files() | own).items() if "chat" not in name}
    wheel = Wheel(write_wheel(tmp_path, "mini", members))
    assert {payload.name for payload in wheel.payloads()} == {file.path for file in entry.files}


def test_what_a_failed_import_staged_does_not_reach_the_next_one(store: Store, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "mine")
    (folder / "extra.safetensors").write_bytes(b"broken")
    with pytest.raises(SourceError, match=r"extra\.safetensors"):
        import_model(store, str(folder))
    (folder / "extra.safetensors").unlink()
    assert {file.path for file in import_model(store, str(folder)).files} == set(model_files())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "absent", "is no file, no folder"),
        (lambda folder: folder / "w.bin", "pickle"),
        (lambda folder: folder / "w.safetensors", "as its whole folder"),
        (lambda folder: folder / "bins", "pickle"),
        (lambda folder: folder / "w.gguf", "not a GGUF file"),
    ],
    ids=["absent", "pickle", "lone file", "folder of pickles", "wrong format"],
)
def test_a_source_that_is_no_model_is_refused(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Path], says: str
) -> None:
    Converter.installed(monkeypatch)
    for name in ("w.bin", "w.safetensors", "w.gguf"):
        (tmp_path / name).write_bytes(b"something")
    (tmp_path / "bins").mkdir()
    (tmp_path / "bins" / "pytorch_model.bin").write_bytes(b"something")
    with pytest.raises(SourceError, match=says):
        import_model(store, str(make(tmp_path)))
    assert store.list() == []


@pytest.mark.parametrize("absent", NEEDED)
def test_without_the_worker_extra_the_error_says_what_to_install(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: str
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else find_spec(name))
    with pytest.raises(MissingExtra, match=r"pip install 'llmos\[worker\]'"):
        import_model(store, write_gguf(tmp_path))
    with pytest.raises(MissingExtra):
        convert(tmp_path / "a.gguf", tmp_path / "out", Silent())


def test_the_default_is_imported_once(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    def fake(store: Store, source: str, *, name: str, progress: object) -> Manifest:
        del progress
        asked.append((source, name))
        return import_model(store, str(write_model(tmp_path / "default")), name=name)

    monkeypatch.setattr(default, "import_model", fake)
    first = ensure_default(store)
    assert ensure_default(store) == first
    assert asked == [(DEFAULT_SOURCE, DEFAULT_NAME)]
    store.blob_path(first.files[0].sha256).unlink()
    store.verify(ensure_default(store))
    assert len(asked) == 2


def test_every_error_is_one_sentence_without_a_stack(store: Store) -> None:
    with pytest.raises(LlmosError) as caught:
        import_model(store, "nothing\nhere" * 100)
    assert len(caught.value.message) < 400
