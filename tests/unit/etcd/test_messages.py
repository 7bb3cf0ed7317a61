"""The message classes, rebuilt without executing the package they come from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llmos.errors import ConfigError
from llmos.etcd import messages as pb
from llmos.etcd.messages import serialized_descriptor


@pytest.fixture
def unread() -> None:
    """Forget what was read; a failed reading is not remembered."""
    pb._classes.cache_clear()


def test_wire_format_is_etcds() -> None:
    assert pb.PutRequest(key=b"k", value=b"v", lease=5).SerializeToString() == b"\x0a\x01k\x12\x01v\x18\x05"
    event = pb.WatchResponse.FromString(b"\x5a\x09\x08\x01\x12\x05\x0a\x01k\x18\x07").events[0]
    assert (event.type, event.kv.key, event.kv.mod_revision) == (pb.Event.DELETE, b"k", 7)


def test_progress_request_is_field_three_of_the_union() -> None:
    request = pb.WatchRequest(progress_request=pb.WatchProgressRequest())
    assert request.SerializeToString() == b"\x1a\x00"
    assert request.WhichOneof("request_union") == "progress_request"


def test_the_package_itself_is_not_imported() -> None:
    assert pb.RangeRequest is not None
    assert "etcd3" not in sys.modules


def test_unknown_message() -> None:
    with pytest.raises(AttributeError, match="NoSuchRequest"):
        _ = pb.NoSuchRequest


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("D = x.FileDescriptor(name='a', serialized_pb=_b('\\n\\xff'))", id="protoc 3.6"),
        pytest.param("D = x.FileDescriptor(name='a', serialized_pb=b'\\n\\xff')", id="protoc 3.12"),
        pytest.param("D = x.Default().AddSerializedFile(b'\\n\\xff')", id="protoc 3.20"),
    ],
)
def test_descriptor_is_found_in_every_form(source: str) -> None:
    assert serialized_descriptor(source) == b"\n\xff"


@pytest.mark.parametrize("source", ["", "D = f(serialized_pb=computed())", "D = f(serialized_pb=3)"])
def test_no_descriptor(source: str) -> None:
    with pytest.raises(ValueError, match=r"descriptor|malformed"):
        serialized_descriptor(source)


@pytest.mark.usefixtures("unread")
def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        _ = pb.PutRequest


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("content", [None, "x = 1", "D = f(serialized_pb=b'\\xff\\xff')", "D = f(serialized_pb=b'')"])
def test_damaged_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "kv_pb2.py").write_text(content)
    monkeypatch.setattr(pb, "_folder", lambda: tmp_path)
    with pytest.raises(ConfigError, match="reinstall"):
        _ = pb.PutRequest
