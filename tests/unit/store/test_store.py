"""The store's promises: by content, whole or absent, shared, collected only when nobody refers to it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from llmos.errors import ModelNotFound, SourceError, StoreBusy, StoreCorrupt
from llmos.store import Manifest, Store, folders, import_model
from llmos.store.blobs import Blobs
from llmos.store.layout import Layout
from llmos.store.manifest import seal
from tests.fakes.clock import ManualClock
from tests.fakes.models import model_files, write_model


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", clock=ManualClock(), lock_wait_s=0)


def add(store: Store, tmp_path: Path, name: str, fill: bytes = b"\0") -> Manifest:
    folder = write_model(tmp_path / f"source-{fill.hex()}", fill)
    return import_model(store, str(folder), name=name, environ={})


def blobs(store: Store) -> set[str]:
    return {path.name for path in (store.path / "blobs").rglob("*") if path.is_file()}


def weights(store: Store, entry: Manifest) -> Path:
    file = entry.file("model.safetensors")
    assert file is not None
    return store.blob_path(file.sha256)


def damage(path: Path) -> None:
    path.chmod(0o644)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_what_goes_in_comes_out(store: Store, tmp_path: Path) -> None:
    entry = add(store, tmp_path, "one")
    for name, data in model_files().items():
        assert store.read_file(entry, name) == data
        file = entry.file(name)
        assert file is not None
        assert b"".join(store.read_blob(file.sha256)) == data
        with store.open_blob(file.sha256) as opened:
            assert opened.read() == data


def test_an_empty_store_says_so(store: Store) -> None:
    assert store.list() == []
    with pytest.raises(ModelNotFound, match="nothing yet"):
        store.resolve("one")


def test_a_model_is_found_by_name_version_and_prefix(store: Store, tmp_path: Path) -> None:
    entry = add(store, tmp_path, "one")
    assert entry.name == "one"
    for handle in ("one", entry.version, entry.version[:8]):
        assert store.resolve(handle) == entry
    for handle in (entry.version[:7], "two", "../one", ""):
        with pytest.raises(ModelNotFound, match="It has: one"):
            store.resolve(handle)


def test_the_same_content_under_two_names_is_one_version(store: Store, tmp_path: Path) -> None:
    first, second = add(store, tmp_path, "one"), add(store, tmp_path, "two")
    assert first.version == second.version
    assert [entry.name for entry in store.list()] == ["one", "two"]
    assert len(blobs(store)) == len(model_files())


def test_blobs_are_shared_between_versions_and_kept_until_the_last_one_goes(store: Store, tmp_path: Path) -> None:
    one, two = add(store, tmp_path, "one", b"\1"), add(store, tmp_path, "two", b"\2")
    assert len(blobs(store)) == len(model_files()) + 1
    freed = store.remove("one")
    assert freed == len(model_files()["model.safetensors"])
    assert store.list() == [two]
    store.verify(two)
    store.remove("two")
    assert blobs(store) == set()
    with pytest.raises(ModelNotFound):
        store.resolve(one.version)


def test_removing_one_of_two_names_keeps_the_version(store: Store, tmp_path: Path) -> None:
    entry = add(store, tmp_path, "one")
    store.point("two", entry)
    assert store.remove("one") == 0
    assert store.resolve("two").version == entry.version
    store.verify(store.resolve("two"))


def test_removing_a_version_removes_all_its_names(store: Store, tmp_path: Path) -> None:
    entry = add(store, tmp_path, "one")
    store.point("two", entry)
    store.remove(entry.version[:8])
    assert store.list() == []
    assert blobs(store) == set()


def test_removing_what_is_unknown_changes_nothing(store: Store, tmp_path: Path) -> None:
    entry = add(store, tmp_path, "one")
    with pytest.raises(ModelNotFound, match="'two'"):
        store.remove("two")
    store.verify(entry)


def test_a_name_can_move_to_another_version(store: Store, tmp_path: Path) -> None:
    old, new = add(store, tmp_path, "one", b"\1"), add(store, tmp_path, "one", b"\2")
    assert store.resolve("one") == new
    assert [(entry.name, entry.version) for entry in store.list()] == [("one", new.version), ("", old.version)]


@pytest.mark.parametrize("name", ["", ".hidden", "../up", "a/b", "a" * 97, "blank space"])
def test_a_bad_name_is_refused_before_anything_is_written(store: Store, tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match="cannot be a model name"):
        add(store, tmp_path, name)
    assert not store.path.exists()


def test_materialize_gives_the_same_folder_of_shared_files(store: Store, tmp_path: Path) -> None:
    entry = add(store, tmp_path, "one")
    folder = store.materialize(entry)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == model_files()
    assert (folder / "model.safetensors").samefile(weights(store, entry))
    before = folder.stat().st_ino
    assert store.materialize(entry) == folder
    assert folder.stat().st_ino == before


def test_materialize_repairs_a_damaged_folder(store: Store, tmp_path: Path) -> None:
    entry = add(store, tmp_path, "one")
    folder = store.materialize(entry)
    (folder / "config.json").unlink()
    assert {path.name for path in store.materialize(entry).iterdir()} == set(model_files())


def test_removal_takes_the_folder_along(store: Store, tmp_path: Path) -> None:
    folder = store.materialize(add(store, tmp_path, "one"))
    store.remove("one")
    assert not folder.exists()


def test_damage_is_found_and_healed_by_importing_again(store: Store, tmp_path: Path) -> None:
    entry = add(store, tmp_path, "one")
    folder = store.materialize(entry)
    damage(weights(store, entry))
    with pytest.raises(StoreCorrupt, match=r"model\.safetensors of one"):
        store.verify(entry)
    again = add(store, tmp_path, "one")
    store.verify(again)
    assert store.materialize(again) == folder
    assert (folder / "model.safetensors").read_bytes() == model_files()["model.safetensors"]


def test_a_damaged_small_file_is_never_handed_out(store: Store, tmp_path: Path) -> None:
    entry = add(store, tmp_path, "one")
    file = entry.file("tokenizer.json")
    assert file is not None
    damage(store.blob_path(file.sha256))
    with pytest.raises(StoreCorrupt, match=r"tokenizer\.json"):
        store.read_file(entry, "tokenizer.json")
    with pytest.raises(ModelNotFound):
        store.read_file(entry, "absent.json")


def test_a_damaged_manifest_is_refused_and_can_be_removed(store: Store, tmp_path: Path) -> None:
    entry = add(store, tmp_path, "one")
    path = store.path / "manifests" / f"{entry.version}.json"
    path.write_bytes(path.read_bytes().replace(b"float32", b"float16"))
    with pytest.raises(StoreCorrupt):
        store.resolve("one")
    store.remove("one")
    assert store.list() == []
    assert blobs(store) == set()


def test_a_damaged_manifest_is_healed_by_importing_again(store: Store, tmp_path: Path) -> None:
    entry = add(store, tmp_path, "one")
    (store.path / "manifests" / f"{entry.version}.json").write_bytes(b"{}")
    assert add(store, tmp_path, "one") == entry


@pytest.mark.parametrize("handle", ["..", "a" * 63, "A" * 64, "../" + "a" * 61])
def test_only_hashes_reach_the_file_system(store: Store, handle: str) -> None:
    with pytest.raises(ValueError, match="SHA-256"):
        store.blob_path(handle)


def test_a_transfer_brings_the_same_version(store: Store, tmp_path: Path) -> None:
    entry = add(store, tmp_path, "one")
    other = Store(tmp_path / "other")
    received = other.receive(entry, store.read_blob, name="copy")
    assert received.version == entry.version
    other.verify(received)


def test_a_transfer_refuses_wrong_bytes_and_resumes(store: Store, tmp_path: Path) -> None:
    entry = add(store, tmp_path, "one")
    other = Store(tmp_path / "other")
    asked: list[str] = []

    def flaky(sha256: str) -> Iterator[bytes]:
        asked.append(sha256)
        yield b"wrong" if len(asked) == 3 else b"".join(store.read_blob(sha256))

    with pytest.raises(StoreCorrupt, match="wrong hash"):
        other.receive(entry, flaky)
    assert blobs(other) == set()
    other.verify(other.receive(entry, flaky))
    assert len(asked) == len(entry.files) + 1


def test_a_transfer_refuses_a_manifest_that_lies(store: Store, tmp_path: Path) -> None:
    entry = msgspec.structs.replace(add(store, tmp_path, "one"), layers=99)
    with pytest.raises(StoreCorrupt):
        Store(tmp_path / "other").receive(entry, store.read_blob)


def test_a_transfer_writes_nowhere_else(store: Store, tmp_path: Path) -> None:
    entry = add(store, tmp_path, "one")
    (first, *rest) = entry.files
    strayed = seal(
        msgspec.structs.replace(entry, files=(msgspec.structs.replace(first, path="../../../strayed"), *rest))
    )
    other = Store(tmp_path / "other")
    with pytest.raises(StoreCorrupt, match="file"):
        other.receive(strayed, store.read_blob)
    assert not list(tmp_path.rglob("strayed*"))


class TellingClock(ManualClock):
    """Says when somebody begins to wait for a lock."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()

    def monotonic(self) -> float:
        self.asked.set()
        return super().monotonic()


def test_two_that_lay_a_model_out_at_once_share_one_folder(store: Store, tmp_path: Path) -> None:
    entry = add(store, tmp_path, "one")
    clock = TellingClock()
    slow = Store(store.path, clock=clock)
    with ThreadPoolExecutor(1) as pool:
        with store._lock():
            waiting = pool.submit(slow.materialize, entry)
            assert clock.asked.wait(10)
            folders.lay_out(entry, store.path / "models" / entry.version, Blobs(Layout(store.path)))
            before = (store.path / "models" / entry.version).stat().st_ino
        assert waiting.result(10).stat().st_ino == before, "somebody may be loading from it already"


@pytest.mark.parametrize("content", [b"", b"{", b'{"version": 1}'])
def test_a_damaged_import_key_only_costs_the_import(store: Store, tmp_path: Path, content: bytes) -> None:
    entry = add(store, tmp_path, "one")
    (store.path / "imports").mkdir(exist_ok=True)
    key = store.path / "imports" / "key.json"
    key.write_bytes(content)
    assert store.find_import("key") is None
    add(store, tmp_path, "two", b"\1")
    store.remove("two")
    assert not key.exists()
    assert store.resolve("one") == entry


def test_removal_waits_for_a_commit_only_as_long_as_it_may(store: Store, tmp_path: Path) -> None:
    add(store, tmp_path, "one")
    with store._lock(), pytest.raises(StoreBusy):
        store.remove("one")
    assert store.resolve("one").name == "one"


def test_removal_clears_abandoned_staging_but_not_an_import_under_way(store: Store, tmp_path: Path) -> None:
    add(store, tmp_path, "one")
    with pytest.raises(ValueError), store.staging("abandoned") as left:
        (left / "half").write_bytes(b"x")
        raise ValueError
    assert left.exists()
    with store.staging("busy") as busy:
        store.remove("one")
        assert busy.exists()
    assert not left.exists()


def test_a_crash_between_blobs_and_manifest_shows_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise OSError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr("llmos.store.files.write_atomic", crash)
        with pytest.raises(SourceError, match="power cut"):
            add(store, tmp_path, "one")
    assert store.list() == []
    entry = add(store, tmp_path, "one")
    store.verify(entry)


def test_blobs_are_read_only(store: Store, tmp_path: Path) -> None:
    entry = add(store, tmp_path, "one")
    assert all(store.blob_path(file.sha256).stat().st_mode & 0o222 == 0 for file in entry.files)


def test_a_failed_copy_leaves_no_blob(store: Store, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "source")
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(SourceError, match="not a safetensors file"):
        import_model(store, str(folder), environ={})
    assert blobs(store) == set()
    assert store.list() == []
