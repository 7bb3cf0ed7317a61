"""`llmos models` as a person and as a program sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from llmos.cli.models import app
from llmos.errors import ModelNotFound
from llmos.store import Store
from llmos.store.precision import Measured, PlanRecord, PrecisionPlan
from tests.fakes.models import model_files, write_model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMOS_STORE", str(tmp_path / "store"))
    return write_model(tmp_path / "Tiny")


def run(*arguments: str) -> Result:
    result: Result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def as_json(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


def test_import_list_show_verify_remove(folder: Path) -> None:
    assert "no models" in run("ls").stdout
    imported = run("import", str(folder))
    assert imported.stdout.startswith("tiny is version ")
    assert "copying" in imported.stderr
    assert "tiny" in run("ls").stdout
    shown = run("show", "tiny").stdout
    assert "LlamaForCausalLM (llama)" in shown
    assert "model.safetensors" in shown
    assert "whole" in run("verify").stdout
    assert run("rm", "tiny").stdout.startswith("tiny is removed")
    assert as_json("ls") == []


def test_json_for_programs(folder: Path) -> None:
    imported = as_json("import", str(folder), "--name", "mine")
    assert as_json("ls") == [imported]
    assert imported["name"] == "mine"
    assert imported["size_bytes"] == sum(map(len, model_files().values()))
    shown = as_json("show", imported["version"][:8])
    assert shown["version"] == imported["version"]
    assert {file["path"] for file in shown["files"]} == set(model_files())
    assert as_json("verify", "mine") == [{"name": "mine", "version": imported["version"], "whole": True, "problem": ""}]
    assert as_json("rm", "mine") == {"removed": "mine", "freed_bytes": imported["size_bytes"]}


def test_damage_is_reported_with_exit_status_1(folder: Path) -> None:
    run("import", str(folder))
    store = Store()
    entry = store.resolve("tiny")
    path = store.blob_path(entry.files[0].sha256)
    path.chmod(0o644)
    path.write_bytes(b"damaged")
    result = run("verify", "--json")
    assert result.exit_code == 1
    assert entry.files[0].path in json.loads(result.stdout)[0]["problem"]


def test_the_precision_plan_is_shown(folder: Path) -> None:
    run("import", str(folder))
    assert "measured at the first use" in run("show", "tiny").stdout
    # Nothing about this model is worth measuring.
    assert run("plan", "tiny").stdout == "tiny: fp32\n"
    assert as_json("plan", "tiny") is None
    store = Store()
    entry = store.resolve("tiny")
    plan = PrecisionPlan.uniform("int8", entry.layers).changed({"head": "fp16"})
    measured = Measured(kl=0.00123, perplexity_ratio=1.0004, tokens=9, weight_bytes=1)
    store.keep_plan(PlanRecord(version=entry.version, plan=plan, measured=measured))
    shown = " ".join(run("show", "tiny").stdout.split())
    assert "int8 (8 matrices), fp16 (1 matrices): KL 0.0012 to fp32" in shown
    assert as_json("show", "tiny")["precision"] == as_json("plan", "tiny")
    assert as_json("plan", "tiny")["measured"]["kl"] == 0.00123


@pytest.mark.parametrize("command", ["rm", "show", "verify"])
def test_an_unknown_model_is_a_typed_error(folder: Path, command: str) -> None:
    run("import", str(folder))
    with pytest.raises(ModelNotFound, match=r"'absent'.*It has: tiny"):
        run(command, "absent")


def test_another_store_can_be_named(folder: Path, tmp_path: Path) -> None:
    run("import", str(folder), "--store", str(tmp_path / "other"))
    assert as_json("ls") == []
    assert [entry["name"] for entry in as_json("ls", "--store", str(tmp_path / "other"))] == ["tiny"]
