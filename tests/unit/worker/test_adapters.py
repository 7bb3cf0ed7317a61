"""Adapters on a worker: which it holds, and that one is never there without its base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llmos.errors import ConfigError
from llmos.internal.v1 import registry_pb2, requests_pb2, work_pb2
from llmos.store import Store, import_model
from llmos.store.precision import PlanRecord, PrecisionPlan, identity
from llmos.v1 import fleet_pb2
from tests.fakes.models import LINEARS, write_base, write_model, write_peft
from tests.unit.worker.rig import LOADED, Rig, dispatch, load
from worker.adapter_spec import adapter_spec
from worker.adapters import AdapterWatch, hold_with_adapters
from worker.engine_process import EngineModel
from worker.models import HeldModel, echo_model
from worker.shelf import Shelf

AVAILABLE, FAILED = fleet_pb2.MODEL_STATE_AVAILABLE, fleet_pb2.MODEL_STATE_FAILED


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A base, two adapters to it, and another model."""
    store = Store(tmp_path / "store")
    import_model(store, str(write_base(tmp_path / "base")), environ={})
    import_model(store, str(write_model(tmp_path / "other")), environ={})
    import_model(store, str(write_peft(tmp_path / "tone", "base")), environ={})
    import_model(store, str(write_peft(tmp_path / "style", "base", lora_alpha=1)), environ={})
    return store


def test_a_worker_holds_the_adapters_to_its_models(store: Store) -> None:
    base, style, tone = hold_with_adapters("torch", ["base"], store.path, "fp32")
    assert [model.name for model in (base, style, tone)] == ["base", "style", "tone"]
    record, wanted = tone.record.model, base.record.model
    assert (record.base_model, record.version) == ("base", store.resolve("tone").version)
    assert (record.tokenizer_hash, record.context_length) == (wanted.tokenizer_hash, wanted.context_length)
    assert list(record.capabilities) == list(wanted.capabilities)
    # Rank 2 is padded to 8.
    assert tone.record.weight_bytes == 4 * 8 * sum(map(sum, LINEARS.values()))
    assert (tone.record.kv_bytes_per_token, tone.record.workspace_bytes) == (0, 0)
    spec = tone.engine.spec()
    assert spec.base == "base"
    assert spec.folder is not None
    assert (spec.folder / "adapter_config.json").is_file()
    assert [model.name for model in hold_with_adapters("torch", ["other"], store.path, "fp32")] == ["other"]


def test_an_adapter_is_another_version_on_a_base_of_another_precision(store: Store) -> None:
    entry = store.resolve("base")
    plan = PrecisionPlan.uniform("int8", entry.layers)
    store.keep_plan(PlanRecord(version=entry.version, plan=plan))
    base, _, tone = hold_with_adapters("torch", ["base"], store.path, "fp32")
    assert base.engine.version == identity(entry.version, plan)
    assert tone.engine.version == tone.record.model.version == identity(store.resolve("tone").version, plan)


def test_an_adapter_may_be_named_beside_its_base_but_not_alone(store: Store) -> None:
    names = [model.name for model in hold_with_adapters("torch", ["tone", "base"], store.path, "fp32")]
    assert names == ["base", "style", "tone"]
    for alone in (["tone"], ["other", "tone"]):
        with pytest.raises(ConfigError, match="tone is an adapter"):
            hold_with_adapters("torch", alone, store.path, "fp32")


def test_an_adapter_to_another_version_of_its_base_is_not_held(store: Store, tmp_path: Path) -> None:
    (tmp_path / "base" / "chat_template.jinja").write_text("other")
    import_model(store, str(tmp_path / "base"), environ={})
    assert [model.name for model in hold_with_adapters("torch", ["base"], store.path, "fp32")] == ["base"]


def test_damaged_adapters_are_left_out(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    tone = store.resolve("tone")
    weights = next(file for file in tone.files if file.path.endswith(".safetensors"))
    style = store.resolve("style")
    assert weights.sha256 in {file.sha256 for file in style.files}
    config = next(file for file in tone.files if file.path.endswith(".json"))
    store.blob_path(config.sha256).unlink()
    assert [model.name for model in hold_with_adapters("torch", ["base"], store.path, "fp32")] == ["base", "style"]
    assert "tone is damaged" in caplog.text


def test_adapters_that_come_later_are_found_once(store: Store, tmp_path: Path) -> None:
    held = hold_with_adapters("torch", ["base"], store.path, "fp32")
    watch = AdapterWatch(store, held)
    assert watch.look() == []
    import_model(store, str(write_peft(tmp_path / "late", "base", lora_alpha=9)), environ={})
    import_model(store, str(write_model(tmp_path / "third")), environ={})
    (late,) = watch.look()
    assert (late.name, late.engine.base) == ("late", "base")
    assert watch.look() == []
    shelf = Shelf(held, fleet_pb2.Capacity(devices=[fleet_pb2.Device(id="cpu", memory_bytes=2**40)]))
    shelf.all()
    shelf.add([late])
    assert [model.name for model in shelf.take_changes()] == ["late"]
    order = work_pb2.LoadModel(model="late", version=late.engine.version)
    spec = adapter_spec(store.path, [held[0].engine.spec()], order)
    assert spec == replace(late.engine.spec(), weight_bytes=0)
    assert adapter_spec(store.path, [], order) is None
    for version in (held[0].engine.version, "nothing"):
        assert adapter_spec(store.path, [held[0].engine.spec()], work_pb2.LoadModel(version=version)) is None


def _adapter(name: str, base: str) -> HeldModel:
    model = requests_pb2.CatalogueModel(name=name, version="1", base_model=base)
    return HeldModel(registry_pb2.ModelRecord(model=model), EngineModel(name=name, version="1", base=base))


def shelf() -> Shelf:
    capacity = fleet_pb2.Capacity(devices=[fleet_pb2.Device(id="cpu", memory_bytes=2**30)])
    return Shelf([echo_model("echo"), _adapter("tone", "echo"), _adapter("style", "echo")], capacity)


def states(of: Shelf) -> dict[str, int]:
    return {model.name: model.state for model in of.all()}


def said(name: str, state: fleet_pb2.ModelState.ValueType) -> fleet_pb2.NodeModel:
    return fleet_pb2.NodeModel(name=name, state=state)


def test_an_adapter_is_loaded_after_its_base_and_goes_with_it() -> None:
    held = shelf()
    assert held.order(work_pb2.LoadModel(model="tone")) is None
    assert states(held)["tone"] == FAILED
    for name in ("echo", "style"):
        assert held.order(work_pb2.LoadModel(model=name)) is not None
        held.engine_said(said(name, LOADED))
    assert [order.model for order in held.orders] == ["echo", "style"]
    held.unload("echo")
    assert states(held) == {"echo": fleet_pb2.MODEL_STATE_UNLOADING, "style": AVAILABLE, "tone": FAILED}
    assert not list(held.orders)


def test_attempts_need_the_adapter_and_end_with_it() -> None:
    rig = Rig()
    rig.shelf = rig.core._shelf = shelf()
    for name in ("echo", "tone"):
        rig.send(load(name))
        rig.shelf.engine_said(said(name, LOADED))
    wanted, lacking = dispatch("a"), dispatch("b")
    wanted.dispatch.request.adapter, lacking.dispatch.request.adapter = "tone", "style"
    rig.send(wanted, lacking, dispatch("c"))
    assert [failure.request_id for failure in rig.core.next_frame().failures] == ["b"]
    rig.send(work_pb2.Command(unload=work_pb2.UnloadModel(model="tone")))
    assert [failure.request_id for failure in rig.core.next_frame().failures] == ["a"]
    assert rig.running() == [("c", 1)]
