"""What placement must know is read from config, tokenizer files and safetensors headers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from llmos.errors import SourceError
from llmos.store import Manifest, ManifestFile
from llmos.store.describe import chat_template, describe
from tests.fakes.models import CONFIG, TEMPLATE, safetensors, write_model


def describe_folder(folder: Path) -> Manifest:
    files = [
        ManifestFile(path=path.name, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size=path.stat().st_size)
        for path in folder.iterdir()
    ]
    return describe(folder, files, source="here", license_id="MIT", created_unix_s=7)


def with_config(folder: Path, config: dict[str, Any]) -> Path:
    write_model(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_numbers_of_a_llama(tmp_path: Path) -> None:
    entry = describe_folder(write_model(tmp_path))
    assert (entry.architecture, entry.model_type, entry.dtype) == ("LlamaForCausalLM", "llama", "float32")
    assert (entry.layers, entry.kv_heads, entry.head_dim, entry.hidden_size) == (2, 2, 4, 16)
    assert (entry.parameter_count, entry.weight_bytes) == (32 * 16 + 16, 4 * (32 * 16 + 16))
    assert entry.kv_bytes_per_token == 2 * 2 * 2 * 4 * 4
    assert (entry.context_length, entry.vocab_size) == (128, 32)
    assert entry.tokenizer_hash == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
    assert (entry.bos_token, entry.eos_token, entry.eos_token_ids) == ("t1", "t2", (2, 3))
    assert entry.chat_template == TEMPLATE
    assert (entry.source, entry.license, entry.created_unix_s) == ("here", "MIT", 7)


@pytest.mark.parametrize(
    ("change", "kv_bytes"),
    [
        ({"num_key_value_heads": None}, 2 * 2 * 4 * 4 * 4),
        ({"head_dim": 8}, 2 * 2 * 2 * 8 * 4),
        ({"num_key_value_heads": [1, 2]}, 2 * 2 * 2 * 4 * 4),
        ({"text_config": {"num_hidden_layers": 5}}, 2 * 5 * 2 * 4 * 4),
    ],
    ids=["no grouped heads", "head_dim of its own", "heads per layer", "text inside a larger model"],
)
def test_kv_bytes_follow_the_config(tmp_path: Path, change: dict[str, Any], kv_bytes: int) -> None:
    config = {key: value for key, value in {**CONFIG, **change}.items() if value is not None}
    assert describe_folder(with_config(tmp_path, config)).kv_bytes_per_token == kv_bytes


def test_half_precision_halves_the_kv_bytes(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(safetensors({"a": (8, 8)}, "BF16"))
    entry = describe_folder(tmp_path)
    assert (entry.dtype, entry.kv_bytes_per_token, entry.weight_bytes) == ("bfloat16", 2 * 2 * 2 * 4 * 2, 128)


def test_weights_in_several_files_are_added_up(tmp_path: Path) -> None:
    write_model(tmp_path, without=["model.safetensors"])
    for number in (1, 2):
        data = safetensors({f"w{number}": (4, 4)})
        (tmp_path / f"model-0000{number}-of-00002.safetensors").write_bytes(data)
    assert describe_folder(tmp_path).parameter_count == 32


def test_the_end_tokens_of_the_config_count_without_a_generation_config(tmp_path: Path) -> None:
    assert describe_folder(write_model(tmp_path, without=["generation_config.json"])).eos_token_ids == (2,)


def test_a_model_without_end_tokens_or_template_has_none(tmp_path: Path) -> None:
    config = {key: value for key, value in CONFIG.items() if key != "eos_token_id"}
    folder = with_config(tmp_path, config)
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer_config.json"):
        (folder / name).unlink()
    entry = describe_folder(folder)
    assert (entry.eos_token_ids, entry.chat_template, entry.chat_template_hash, entry.bos_token) == ((), "", "", "")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", "T"),
        ("chat_template.json", json.dumps({"chat_template": "T"})),
        ("tokenizer_config.json", json.dumps({"chat_template": "T"})),
        (
            "tokenizer_config.json",
            json.dumps({"chat_template": [{"name": "rag", "template": "R"}, {"name": "default", "template": "T"}]}),
        ),
    ],
)
def test_a_chat_template_is_found_wherever_it_is_written(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert chat_template(tmp_path) == "T"


def test_the_file_wins_over_the_tokenizer_config(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("new")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "old"}))
    assert chat_template(tmp_path) == "new"


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("config.json", "no config.json"),
        ("tokenizer.json", "no tokenizer.json"),
        ("model.safetensors", "no weights"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, missing: str, says: str) -> None:
    with pytest.raises(SourceError, match=says):
        describe_folder(write_model(tmp_path, without=[missing]))


@pytest.mark.parametrize("content", ["[]", "{", '"x"', "\udcff"])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    write_model(tmp_path)
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(SourceError, match=r"config\.json"):
        describe_folder(tmp_path)


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"])
@pytest.mark.parametrize("value", [None, 0, -1, "8", []])
def test_a_config_without_a_needed_number_is_refused(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(SourceError, match=key):
        describe_folder(with_config(tmp_path, {**CONFIG, key: value}))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", {**CONFIG, "text_config": "yes"}),
        ("config.json", {**CONFIG, "architectures": 7}),
        ("config.json", {**CONFIG, "architectures": [7]}),
        ("config.json", {**CONFIG, "hidden_size": 2**70}),
        ("generation_config.json", {"eos_token_id": [None]}),
        ("generation_config.json", {"eos_token_id": ["x"]}),
    ],
    ids=["text_config", "architectures", "architecture", "vast", "no end token", "end token in letters"],
)
def test_values_of_the_wrong_type_are_refused(tmp_path: Path, name: str, content: dict[str, Any]) -> None:
    write_model(tmp_path, without=["chat_template.jinja"])
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(SourceError):
        describe_folder(tmp_path)


def test_templates_without_names_are_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": ["x", {"name": "rag"}]}))
    assert chat_template(tmp_path) == ""


def test_a_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(SourceError, match="chat_template"):
        describe_folder(tmp_path)
