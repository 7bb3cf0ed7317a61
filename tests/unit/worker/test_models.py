"""What `--model` names become."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from llmos.config import TlsConfig
from llmos.errors import ConfigError, ModelNotFound, NotFound
from llmos.store import Store, import_model
from llmos.store.precision import Precision
from tests.fakes.models import TEMPLATE, write_model
from worker.config import WorkerConfig
from worker.models import CHUNK_BYTES, HeldModel, chunks, echo_model, find_blob, hold, parse_size


@pytest.mark.parametrize(
    ("text", "size"), [("40GiB", 40 << 30), ("24GB", 24 * 10**9), ("1.5 MiB", 3 << 19), ("7", 7), ("0B", 0)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "40 gigs", "1e9", "40GiB!", "99999999TiB", "9" * 400])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_size(text)


def test_an_echo_model_declares_its_weights() -> None:
    model = echo_model("big=40GiB")
    assert (model.name, model.record.weight_bytes) == ("big", 40 << 30)
    assert model.engine.weight_bytes == 40 << 30
    assert model.record.model.tokenizer_hash == ""
    assert list(model.record.model.capabilities) == ["chat", "completion"]
    assert (model.record.model.context_length, model.record.model.vocab_size) == (8192, 256)


def test_echo_holds_one_model_unless_told_otherwise() -> None:
    assert [model.name for model in hold("echo", (), None)] == ["echo"]
    assert [model.name for model in hold("echo", ("a", "b=1GiB"), None)] == ["a", "b"]


@pytest.mark.parametrize("names", [("a", "a=1GiB"), ("=1GiB",)])
def test_names_must_be_there_and_differ(names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError):
        hold("echo", names, None)


def test_a_model_that_the_store_lacks_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        hold("torch", ("nobody",), tmp_path)


def test_a_stored_model_shows_what_it_takes_and_serves_its_files(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    entry = import_model(store, str(write_model(tmp_path / "source")), name="tiny", environ={})
    (held,) = hold("torch", ("tiny",), store.path)
    model = held.record.model
    assert (model.name, model.version, held.engine.version) == ("tiny", entry.version, entry.version)
    assert (model.context_length, model.vocab_size, model.bos_token, model.eos_token) == (128, 32, "t1", "t2")
    assert list(model.capabilities) == ["chat", "completion"]
    # 2 layers, keys and values, 2 heads of 4 numbers, in fp32.
    assert held.record.kv_bytes_per_token == 2 * 2 * 2 * 4 * 4
    # The embedding is packed once more as the output layer.
    assert held.record.weight_bytes == (2 * 32 * 16 + 16) * 4
    assert held.record.workspace_bytes == (16 << 20) + 64 * 32 * 4
    assert Path(held.engine.folder, "config.json").exists()
    tokenizer = b"".join(chunks(find_blob([held], model.tokenizer_hash)))
    template = b"".join(chunks(find_blob([held], model.chat_template_hash)))
    assert hashlib.sha256(tokenizer).hexdigest() == model.tokenizer_hash
    assert template.decode() == TEMPLATE
    assert hashlib.sha256(template).hexdigest() == model.chat_template_hash


@pytest.mark.parametrize(("precision", "size"), [("auto", 2), ("fp16", 2), ("fp32", 4)])
def test_on_a_graphics_processor_it_takes_no_copies_but_a_context(
    tmp_path: Path, precision: Precision, size: int
) -> None:
    store = Store(tmp_path / "store")
    entry = import_model(store, str(write_model(tmp_path / "source")), name="tiny", environ={})
    (held,) = hold("torch", ("tiny",), store.path, precision, on_gpu=True)
    assert held.engine.plan is None
    assert held.record.model.version == entry.version
    assert held.record.weight_bytes == (32 * 16 + 16) * size
    assert held.record.kv_bytes_per_token == 2 * 2 * 2 * 4 * size
    assert held.record.workspace_bytes == (1 << 30) + 64 * 32 * 64


def test_torch_needs_a_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        hold("torch", (), tmp_path)


def test_blobs_come_in_chunks(tmp_path: Path) -> None:
    content = bytes(range(256)) * (CHUNK_BYTES // 256) * 2 + b"end"
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    plain = echo_model("echo")
    held = HeldModel(plain.record, plain.engine, {digest: file, "text": content})
    for name in (digest, "text"):
        pieces = list(chunks(find_blob([plain, held], name)))
        assert [len(piece) for piece in pieces] == [CHUNK_BYTES, CHUNK_BYTES, 3]
        assert b"".join(pieces) == content
    with pytest.raises(NotFound):
        find_blob([plain, held], "unknown")


@pytest.mark.parametrize(
    "fields",
    [
        {"lease_ttl_s": 0.0},
        {"orphan_s": -1.0},
        {"drain_s": -0.1},
        {"port": 70_000},
        {"memory_limit": -1},
        {"host": "0.0.0.0"},
        {"host": "worker-1"},
    ],
)
def test_bad_configuration_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        WorkerConfig(**fields)  # type: ignore[arg-type]


TLS = TlsConfig(Path("/ca"), Path("/cert"), Path("/key"))


def test_an_address_that_nobody_can_be_told_is_refused() -> None:
    with pytest.raises(ConfigError, match="schedulers"):
        WorkerConfig(host="0.0.0.0", tls=TLS)
    assert WorkerConfig(host="0.0.0.0", tls=TLS, etcd_endpoints=()).host
    assert WorkerConfig(host="worker-1", tls=TLS).host


def test_no_endpoints_mean_no_registration() -> None:
    assert WorkerConfig(etcd_endpoints=()).etcd() is None
    assert WorkerConfig(etcd_password="secret", etcd_user="u").etcd() is not None
    assert "secret" not in repr(WorkerConfig(etcd_password="secret", etcd_user="u"))
