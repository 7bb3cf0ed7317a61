"""Configuration: precedence, types, and refusal of what is unknown."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from llmos.config import TlsConfig, from_command_line, load
from llmos.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Sample:
    """A service's options."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 0
    """Port, 0 for any."""
    ratio: float = 1.0
    verbose: bool = False
    backend: Literal["echo", "torch"] = "echo"
    peers: tuple[str, ...] = ()
    store: Path | None = None
    tls: TlsConfig = field(default_factory=TlsConfig)


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "llmos.toml"
    file.write_text('[sample]\nhost = "file"\nport = 1\nratio = 0.5\n[sample.tls]\nca_file = "/ca"\n[other]\nx = 1\n')
    environ = {"LLMOS_SAMPLE_PORT": "2", "LLMOS_SAMPLE_RATIO": "0.25", "LLMOS_OTHER_X": "1"}
    config = load(Sample, "sample", file=file, environ=environ, overrides={"ratio": 0.75})
    assert (config.host, config.port, config.ratio) == ("file", 2, 0.75)
    assert config.tls.ca_file == Path("/ca")


def test_text_becomes_the_fields_type() -> None:
    environ = {
        "LLMOS_SAMPLE_PEERS": "a:1, b:2,",
        "LLMOS_SAMPLE_VERBOSE": "yes",
        "LLMOS_SAMPLE_STORE": "/store",
        "LLMOS_SAMPLE_BACKEND": "torch",
        "LLMOS_SAMPLE_TLS_CA_FILE": "/ca",
    }
    config = load(Sample, "sample", environ=environ)
    assert config == Sample(
        verbose=True, backend="torch", peers=("a:1", "b:2"), store=Path("/store"), tls=TlsConfig(Path("/ca"))
    )


def test_what_kubernetes_says_of_a_service_of_that_name_is_no_configuration() -> None:
    environ = {
        "LLMOS_SAMPLE_SERVICE_HOST": "10.0.0.1",
        "LLMOS_SAMPLE_SERVICE_PORT": "80",
        "LLMOS_SAMPLE_SERVICE_PORT_GRPC": "80",
        "LLMOS_SAMPLE_PORT": "tcp://10.0.0.1:80",
        "LLMOS_SAMPLE_PORT_80_TCP": "tcp://10.0.0.1:80",
        "LLMOS_SAMPLE_PORT_80_TCP_ADDR": "10.0.0.1",
    }
    assert load(Sample, "sample", environ=environ) == Sample()


@pytest.mark.parametrize(
    "environ",
    [
        {"LLMOS_SAMPLE_PROT": "1"},
        {"LLMOS_SAMPLE_PORT": "many"},
        {"LLMOS_SAMPLE_RATIO": "nan"},
        {"LLMOS_SAMPLE_RATIO": "inf"},
        {"LLMOS_SAMPLE_BACKEND": "x"},
        {"LLMOS_SAMPLE_VERBOSE": "2"},
    ],
)
def test_bad_environment_is_refused(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        load(Sample, "sample", environ=environ)


@pytest.mark.parametrize("text", ["[sample]\nprot = 1\n", "[sample]\nport = 1.5\n", "[sample", "[sample]\ntls = 3\n"])
def test_bad_files_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(ConfigError):
        load(Sample, "sample", file=file, environ={})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent"):
        load(Sample, "sample", file=tmp_path / "absent.toml", environ={})


def test_half_a_key_pair_is_refused() -> None:
    with pytest.raises(ConfigError, match="together"):
        load(Sample, "sample", environ={}, overrides={"tls.ca_file": "/ca", "tls.cert_file": "/cert"})


def test_help_shows_docstrings_and_flags_fill_nested_fields(capsys: pytest.CaptureFixture[str]) -> None:
    config = from_command_line(Sample, "sample", "sample", ["--tls-ca-file", "/ca", "--peers", "a,b"])
    assert config.tls.ca_file == Path("/ca")
    assert config.peers == ("a", "b")
    with pytest.raises(SystemExit) as stopped:
        from_command_line(Sample, "sample", "sample", ["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "Address to listen on." in shown
    assert "LLMOS_SAMPLE_PORT" in shown


@pytest.mark.parametrize("argv", [["--nope"], ["--port", "x"], ["--tls-cert-file", "c"]])
def test_bad_flags_exit_with_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        from_command_line(Sample, "sample", "sample", argv)
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
