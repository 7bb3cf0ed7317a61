"""A version is what decides bytes, and nothing else."""

from __future__ import annotations

import msgspec
import pytest

from llmos.errors import StoreCorrupt
from llmos.store import Manifest, ManifestFile
from llmos.store.manifest import decode, encode, seal, version_of

ENTRY = seal(
    Manifest(
        architecture="LlamaForCausalLM",
        model_type="llama",
        layers=2,
        kv_heads=2,
        head_dim=4,
        hidden_size=16,
        vocab_size=32,
        context_length=128,
        dtype="float32",
        parameter_count=528,
        weight_bytes=2112,
        kv_bytes_per_token=128,
        tokenizer_hash="a" * 64,
        files=(ManifestFile(path="b", sha256="b" * 64, size=1), ManifestFile(path="a", sha256="c" * 64, size=2)),
        source="somewhere",
        created_unix_s=5,
    )
)


@pytest.mark.parametrize(
    "change",
    [{"name": "x"}, {"source": "elsewhere"}, {"license": "MIT"}, {"created_unix_s": 6}, {"version": ""}],
    ids=lambda change: next(iter(change)),
)
def test_provenance_does_not_change_the_version(change: dict[str, object]) -> None:
    assert version_of(msgspec.structs.replace(ENTRY, **change)) == ENTRY.version


@pytest.mark.parametrize(
    "change",
    [{"dtype": "bfloat16"}, {"tokenizer_hash": "d" * 64}, {"chat_template": "x"}, {"eos_token_ids": (1,)}],
    ids=lambda change: next(iter(change)),
)
def test_what_decides_bytes_changes_the_version(change: dict[str, object]) -> None:
    assert version_of(msgspec.structs.replace(ENTRY, **change)) != ENTRY.version


def test_files_are_in_order_so_that_the_same_files_give_the_same_version() -> None:
    turned = msgspec.structs.replace(ENTRY, files=ENTRY.files[::-1])
    assert [file.path for file in ENTRY.files] == ["a", "b"]
    assert seal(turned).version == ENTRY.version


def test_a_manifest_survives_its_file_without_the_name() -> None:
    named = msgspec.structs.replace(ENTRY, name="x")
    assert decode(encode(named), ENTRY.version) == ENTRY


@pytest.mark.parametrize(
    ("old", "new"), [(b'"layers": 2', b'"layers": 3'), (b'"size": 1', b'"size": 9'), (b"{", b"["), (b'"dtype"', b'"x"')]
)
def test_a_changed_manifest_is_refused(old: bytes, new: bytes) -> None:
    data = encode(ENTRY)
    assert old in data
    with pytest.raises(StoreCorrupt, match=ENTRY.version[:12]):
        decode(data.replace(old, new, 1), ENTRY.version)


@pytest.mark.parametrize(
    "file",
    [
        *({"path": path} for path in ("../outside", "/etc/passwd", "a/b", "..", "", "a\\b")),
        *({"sha256": digest} for digest in ("../" + "a" * 61, "A" * 64)),
        {"size": -1},
    ],
    ids=str,
)
def test_a_manifest_whose_files_would_lie_elsewhere_is_refused(file: dict[str, object]) -> None:
    honest = ManifestFile(path="config.json", sha256="b" * 64, size=1)
    entry = seal(msgspec.structs.replace(ENTRY, files=(msgspec.structs.replace(honest, **file),)))
    with pytest.raises(StoreCorrupt, match="file"):
        decode(encode(entry), entry.version)


def test_a_manifest_under_another_version_is_refused() -> None:
    with pytest.raises(StoreCorrupt):
        decode(encode(ENTRY), "0" * 64)


def test_fields_of_later_releases_leave_earlier_versions_alone() -> None:
    """What a release without them called this version."""
    assert ENTRY.version == "cba7f2b76feb4478f0db485f612ccdb7124e21d103bac70d81e3892232eb62e5"
    assert b"labels" not in encode(ENTRY)
    labelled = seal(msgspec.structs.replace(ENTRY, capabilities=("classify",), labels=("a", "b")))
    assert labelled.version != ENTRY.version
    assert decode(encode(labelled), labelled.version) == labelled
