from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID as Usage

from llmos.certs import Certificates, make_certificates
from llmos.errors import ConfigError

NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certs") / "new", ["gateway.local", "10.0.0.7"], 30, NOW)


def load(made: Certificates, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(made.certificate(name).read_bytes())


def usages(certificate: x509.Certificate) -> set[x509.ObjectIdentifier]:
    return set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


@pytest.mark.parametrize("name", ["server", "client"])
def test_the_authority_signed_it(made: Certificates, name: str) -> None:
    load(made, name).verify_directly_issued_by(load(made, "ca"))


def test_the_server_answers_under_its_names(made: Certificates) -> None:
    names = load(made, "server").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "gateway.local"]
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    assert addresses == ["127.0.0.1", "::1", "10.0.0.7"]


def test_a_client_certificate_cannot_serve(made: Certificates) -> None:
    assert usages(load(made, "server")) == {Usage.SERVER_AUTH, Usage.CLIENT_AUTH}
    assert usages(load(made, "client")) == {Usage.CLIENT_AUTH}


def test_only_the_authority_can_sign(made: Certificates) -> None:
    for name, can_sign in (("ca", True), ("server", False), ("client", False)):
        constraints = load(made, name).extensions.get_extension_for_class(x509.BasicConstraints).value
        assert constraints.ca is can_sign


def test_they_hold_as_long_as_asked(made: Certificates) -> None:
    assert load(made, "server").not_valid_after_utc == NOW + timedelta(days=30)
    assert load(made, "server").not_valid_before_utc < NOW


def test_keys_are_private(made: Certificates) -> None:
    for name in ("ca", "server", "client"):
        assert stat.S_IMODE(made.key(name).stat().st_mode) == 0o600


def test_nothing_is_overwritten(made: Certificates) -> None:
    before = made.key("ca").read_bytes()
    with pytest.raises(ConfigError, match="exists"):
        make_certificates(made.folder, [], 30, NOW)
    assert made.key("ca").read_bytes() == before


@pytest.mark.parametrize(("hosts", "days"), [(["ünicode"], 30), ([], 0), ([], 826)])
def test_bad_input(tmp_path: Path, hosts: list[str], days: int) -> None:
    with pytest.raises(ConfigError):
        make_certificates(tmp_path / "c", hosts, days, NOW)
    assert not (tmp_path / "c" / "server.crt").exists()
