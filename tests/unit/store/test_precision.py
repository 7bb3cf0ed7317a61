"""Plans of precisions: what they say, what of them is identity, and how the store keeps them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from llmos.errors import MissingExtra, ModelNotFound, SourceError
from llmos.store import Manifest, Store, import_model, planning
from llmos.store.planning import ensure_plan, plannable
from llmos.store.precision import Measured, PlanRecord, PrecisionPlan, identity
from tests.fakes.models import write_model
from tests.fakes.store import Recorder

INT8, EXACT = PrecisionPlan.uniform("int8", 2), PrecisionPlan.uniform("fp32", 2)
MEASURED = Measured(kl=0.002, perplexity_ratio=1.001, tokens=1280, weight_bytes=77)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def entry(store: Store, tmp_path: Path) -> Manifest:
    return import_model(store, str(write_model(tmp_path / "source")), name="tiny", environ={})


def record(entry: Manifest, plan: PrecisionPlan = INT8) -> PlanRecord:
    return PlanRecord(version=entry.version, plan=plan, measured=MEASURED)


def test_a_plan_names_every_matrix_and_changes_by_name() -> None:
    names = [name for name, _ in INT8.matrices()]
    assert names[:3] == ["head", "layers.0.qkv", "layers.0.out"]
    assert len(names) == 9
    changed = INT8.changed({"head": "fp16", "layers.1.down": "fp32"})
    assert {name: kind for name, kind in changed.matrices() if kind != "int8"} == {
        "head": "fp16",
        "layers.1.down": "fp32",
    }
    assert changed.changed({"head": "int8", "layers.1.down": "int8"}) == INT8
    with pytest.raises(KeyError, match=r"layers\.2\.qkv"):
        INT8.changed({"layers.2.qkv": "fp16"})


def test_the_plan_and_not_its_measurements_decide_what_a_version_is() -> None:
    version = "ab" * 32
    assert identity(version, None) == identity(version, EXACT) == version
    others = {
        identity(version, plan) for plan in (INT8, INT8.changed({"head": "fp16"}), PrecisionPlan.uniform("fp16", 2))
    }
    assert len(others) == 3
    assert all(other.startswith(f"{version}+") for other in others)
    # A stored plan means the same for every later version of this code.
    assert INT8.digest.startswith("af8eaf237d5854de")


def test_a_plan_is_kept_once_and_goes_with_its_version(store: Store, entry: Manifest) -> None:
    assert store.plan(entry) is None
    store.keep_plan(record(entry))
    store.keep_plan(record(entry, EXACT))
    assert store.plan(store.resolve("tiny")) == record(entry)
    assert store.resolve(identity(entry.version, INT8)).version == entry.version
    assert store.resolve(identity(entry.version, INT8)[:40]).version == entry.version
    store.remove("tiny")
    assert list((store.path / "plans").iterdir()) == []
    with pytest.raises(ModelNotFound):
        store.keep_plan(record(entry))


@pytest.mark.parametrize("damage", ["nothing", b"{}", b"\xff", "another", "layers"])
def test_a_plan_that_cannot_be_read_is_none_and_is_replaced(damage: str | bytes, store: Store, entry: Manifest) -> None:
    store.keep_plan(record(entry))
    path = store.path / "plans" / f"{entry.version}.json"
    if damage == "another":
        path.write_bytes(msgspec.json.encode(PlanRecord(version="0" * 64, plan=INT8)))
    elif damage == "layers":
        path.write_bytes(msgspec.json.encode(PlanRecord(version=entry.version, plan=PrecisionPlan.uniform("int8", 3))))
    elif isinstance(damage, bytes):
        path.write_bytes(damage)
    assert (store.plan(entry) is None) == (damage != "nothing")
    store.keep_plan(record(entry))
    assert store.plan(entry) == record(entry)


def test_a_plan_travels_with_its_version(store: Store, entry: Manifest, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    received = other.receive(entry, store.read_blob, name="tiny", plan=record(entry))
    assert other.plan(received) == record(entry)


def test_what_is_computed_in_fp32_anyway_is_not_measured(store: Store, entry: Manifest) -> None:
    assert not plannable(entry)
    assert ensure_plan(store, entry) is None
    sizes = {"hidden_size": 64, "head_dim": 32}
    assert plannable(msgspec.structs.replace(entry, **sizes))
    assert not plannable(msgspec.structs.replace(entry, **sizes, architecture="GPT2LMHeadModel"))


def test_a_plan_is_measured_once_by_a_child(store: Store, entry: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def child(command: list[str], log: Path, show: object) -> int:
        ran.append(command)
        assert callable(show)
        show('{"stage": "measuring int8", "total": 3}')
        show("something a library prints")
        show('{"advance": 3}')
        log.write_text("a warning\nno memory\n")
        Path(command[command.index("--out") + 1]).write_bytes(msgspec.json.encode(record(entry)))
        return 1 if len(ran) == 1 else 0

    monkeypatch.setattr(planning, "plannable", lambda _: True)
    monkeypatch.setattr("llmos.store.planning.child.run", child)
    progress = Recorder()
    with pytest.raises(SourceError, match="no memory"):
        ensure_plan(store, entry, progress)
    assert store.plan(entry) is None
    assert [ensure_plan(store, entry, progress) for _ in range(2)] == [record(entry)] * 2
    assert len(ran) == 2
    assert progress.stages == [("measuring int8", 3)] * 2
    assert progress.complete()


def test_without_the_worker_extra_nothing_is_measured(
    store: Store, entry: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "plannable", lambda _: True)
    monkeypatch.setattr(planning, "NEEDED", ("no_such_module",))
    with pytest.raises(MissingExtra):
        ensure_plan(store, entry)
