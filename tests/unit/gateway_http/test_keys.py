"""API keys: the file, the ring, the command."""

from __future__ import annotations

import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmos.cli.keys import app
from llmos.errors import ConfigError, NotFound, PermissionDenied, Unauthenticated
from llmos.keys import KeyIdentity, KeyRing, add_key, read_keys, remove_key, set_limits
from llmos.tenants import LimitsChange, TenantLimits


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "keys.json"


def test_a_key_names_tenant_role_and_class(file: Path) -> None:
    key, record = add_key(file, "acme", role="operator", priority="batch")
    assert KeyRing(file).authenticate(f"Bearer {key}") == KeyIdentity("acme", "operator", "batch")
    assert KeyRing(file).authenticate(f"bearer   {key} ") == record.identity


def test_the_file_holds_no_key_and_is_its_owners_alone(file: Path) -> None:
    key, _ = add_key(file, "acme")
    text = file.read_text()
    assert key not in text
    assert key.split("-")[-1] not in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["keys.json"]


def test_equal_tenants_get_different_keys(file: Path) -> None:
    (one, first), (other, second) = add_key(file, "acme"), add_key(file, "acme")
    assert one != other
    assert (first.id, first.salt) != (second.id, second.salt)
    assert len(read_keys(file)) == 2


def test_keys_that_are_added_at_once_are_all_kept(file: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = {record.id for _, record in pool.map(lambda number: add_key(file, f"tenant-{number}"), range(24))}
    assert {record.id for record in read_keys(file)} == ids
    assert len(ids) == 24


def test_anything_but_a_valid_key_is_refused(file: Path) -> None:
    key, record = add_key(file, "acme")
    other, _ = add_key(file, "other")
    ring = KeyRing(file)
    mixed = f"sk-llmos-{record.id}-{other.split('-', 3)[3]}"
    for header in (None, "", "Bearer", "Bearer ", f"Basic {key}", key, f"Bearer {key}x", "Bearer sk-llmos--", mixed):
        with pytest.raises(Unauthenticated):
            ring.authenticate(header if header != mixed else f"Bearer {mixed}")
    with pytest.raises(Unauthenticated):
        ring.authenticate("Bearer \u00e9\u00e9")


def test_without_a_file_everybody_operates_the_default_tenant() -> None:
    assert KeyRing().authenticate(None) == KeyIdentity("default", "operator")
    assert KeyRing().open


def test_keys_come_and_go_without_a_restart(file: Path) -> None:
    first, _ = add_key(file, "acme")
    ring = KeyRing(file)
    second, record = add_key(file, "other")
    assert ring.authenticate(f"Bearer {second}").tenant == "other"
    remove_key(file, record.id)
    with pytest.raises(Unauthenticated):
        ring.authenticate(f"Bearer {second}")
    assert ring.authenticate(f"Bearer {first}").tenant == "acme"


@pytest.mark.parametrize("damage", ["gone", "broken"])
def test_a_damaged_file_opens_no_door_and_closes_none(file: Path, damage: str) -> None:
    key, _ = add_key(file, "acme")
    ring = KeyRing(file)
    if damage == "gone":
        file.unlink()
    else:
        file.write_text("{")
    assert ring.authenticate(f"Bearer {key}").tenant == "acme"
    with pytest.raises(Unauthenticated):
        ring.authenticate("Bearer other")


@pytest.mark.parametrize(
    "text", ["", "[]", '{"version": 2, "keys": []}', '{"version": 1, "keys": [{"id": "x"}]}', '{"keys": []}', "\xff"]
)
def test_what_is_no_keys_file_is_refused_at_the_start(file: Path, text: str) -> None:
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(ConfigError):
        KeyRing(file)


def test_a_missing_file_is_refused_at_the_start(file: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        KeyRing(file)


def test_bad_tenants_and_unknown_ids(file: Path) -> None:
    for tenant in ("", "x" * 129, "a\nb"):
        with pytest.raises(ConfigError):
            add_key(file, tenant)
    add_key(file, "acme")
    with pytest.raises(NotFound):
        remove_key(file, "nope")


def test_operators_calls() -> None:
    KeyIdentity("t", "operator").require_operator()
    with pytest.raises(PermissionDenied):
        KeyIdentity("t").require_operator()


def test_the_command(file: Path) -> None:
    run = CliRunner().invoke
    made = run(app, ["add", "--tenant", "acme", "--role", "operator", "--class", "interactive", "-f", str(file)])
    assert made.exit_code == 0
    key = made.stdout.strip()
    assert KeyRing(file).authenticate(f"Bearer {key}") == KeyIdentity("acme", "operator", "interactive")
    listed = run(app, ["ls", "--json", "-f", str(file)])
    (entry,) = json.loads(listed.stdout)
    assert (entry["tenant"], entry["role"], entry["class"]) == ("acme", "operator", "interactive")
    assert entry["id"] in run(app, ["ls", "-f", str(file)]).stdout
    assert run(app, ["rm", entry["id"], "-f", str(file)]).exit_code == 0
    assert read_keys(file) == []
    assert run(app, ["add", "--tenant", "x", "--role", "king", "-f", str(file)]).exit_code == 2


def test_weight_and_limits_are_the_tenants(file: Path) -> None:
    first, _ = add_key(file, "acme", limits=LimitsChange(weight=4, max_requests=10))
    second, record = add_key(file, "acme")
    other, _ = add_key(file, "other")
    assert record.limits == TenantLimits(4, 10, 0)
    ring = KeyRing(file)
    assert ring.authenticate(f"Bearer {second}").limits == TenantLimits(4, 10, 0)
    assert set_limits(file, "acme", LimitsChange(max_requests=0, tokens_per_minute=600)) == TenantLimits(4, 0, 600)
    for key in (first, second):
        assert ring.authenticate(f"Bearer {key}").limits == TenantLimits(4, 0, 600)
    assert ring.authenticate(f"Bearer {other}").limits == TenantLimits()
    with pytest.raises(NotFound):
        set_limits(file, "nobody", LimitsChange(weight=2))
    with pytest.raises(ConfigError):
        set_limits(file, "acme", LimitsChange(weight=0))


def test_keys_of_earlier_releases_have_weight_1_and_no_limits(file: Path) -> None:
    add_key(file, "acme")
    assert "weight" not in file.read_text()
    assert read_keys(file)[0].limits == TenantLimits(1, 0, 0)


def test_limits_on_the_command_line(file: Path) -> None:
    run = CliRunner().invoke
    flags = ["--weight", "4", "--max-requests", "8", "--tokens-per-minute", "1000"]
    assert run(app, ["add", "--tenant", "acme", *flags, "-f", str(file)]).exit_code == 0
    (entry,) = json.loads(run(app, ["ls", "--json", "-f", str(file)]).stdout)
    assert (entry["weight"], entry["max_requests"], entry["tokens_per_minute"]) == (4, 8, 1000)
    said = run(app, ["set", "acme", "--weight", "2", "--max-requests", "0", "-f", str(file)])
    assert said.stdout == "acme: weight 2, any requests, 1000 tokens per minute\n"
    assert run(app, ["set", "acme", "-f", str(file)]).exit_code == 2
    assert run(app, ["add", "--tenant", "x", "--weight", "0", "-f", str(file)]).exit_code == 2
