"""A development CA: one authority, one certificate for the services, one for clients. Not for production.

Needs the `certs` extra. Keys are P-256; the CA's own key stays in the folder so that more certificates can be signed.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from llmos.errors import ConfigError, MissingExtra

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

LOOPBACK = ("localhost", "127.0.0.1", "::1")
LONGEST_DAYS = 825
_CLOCK_SLACK = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Certificates:
    """The files of a folder of certificates, all PEM."""

    folder: Path

    @property
    def ca(self) -> Path:
        """What both sides trust."""
        return self.folder / "ca.crt"

    def certificate(self, name: str) -> Path:
        """Certificate of `ca`, `server` or `client`."""
        return self.folder / f"{name}.crt"

    def key(self, name: str) -> Path:
        """Private key of `ca`, `server` or `client`; readable by its owner alone."""
        return self.folder / f"{name}.key"


def make_certificates(folder: Path, hosts: Sequence[str], days: int, now: datetime) -> Certificates:
    """Write a CA and the certificates of server (also good as a client: services call each other) and client.

    `hosts` are names or addresses that the server answers under, besides loopback. Nothing is overwritten: a folder
    that has any of the files raises ConfigError.
    """
    _need_cryptography()
    if not 1 <= days <= LONGEST_DAYS:
        raise ConfigError(f"--days must be between 1 and {LONGEST_DAYS}", param="days")
    files = Certificates(folder)
    _refuse_overwrite(files)
    _make_folder(folder)
    validity = (now - _CLOCK_SLACK, now + timedelta(days=days))
    authority, authority_key = _authority(validity)
    _write(files, "ca", authority, authority_key)
    names = tuple(dict.fromkeys([*LOOPBACK, *hosts]))
    for name, alternatives in (("server", names), ("client", ())):
        certificate, key = _leaf(name, alternatives, authority, authority_key, validity)
        _write(files, name, certificate, key)
    return files


def _need_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise MissingExtra("certs", "Making certificates") from error


def _refuse_overwrite(files: Certificates) -> None:
    for name in ("ca", "server", "client"):
        for path in (files.certificate(name), files.key(name)):
            if path.exists():
                raise ConfigError(f"{path} exists: choose another folder or remove it first")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {folder}: {error.strerror}") from error


def _authority(validity: tuple[datetime, datetime]) -> tuple[x509.Certificate, EllipticCurvePrivateKey]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("llmos development CA")
    builder = _builder(name, name, key, validity)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
    return builder.sign(key, hashes.SHA256()), key


def _leaf(
    role: str,
    hosts: Sequence[str],
    authority: x509.Certificate,
    authority_key: EllipticCurvePrivateKey,
    validity: tuple[datetime, datetime],
) -> tuple[x509.Certificate, EllipticCurvePrivateKey]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID as Usage

    key = ec.generate_private_key(ec.SECP256R1())
    usages = [Usage.CLIENT_AUTH, Usage.SERVER_AUTH] if hosts else [Usage.CLIENT_AUTH]
    builder = _builder(_name(f"llmos {role}"), authority.subject, key, validity)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    builder = builder.add_extension(issuer, critical=False)
    if hosts:
        builder = builder.add_extension(
            x509.SubjectAlternativeName([_alternative(host) for host in hosts]), critical=False
        )
    return builder.sign(authority_key, hashes.SHA256()), key


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, validity: tuple[datetime, datetime]
) -> x509.CertificateBuilder:
    from cryptography import x509

    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number(), *validity)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)


def _name(common_name: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative(host: str) -> x509.GeneralName:
    from cryptography import x509

    # A ValueError here says that it is a name.
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise ConfigError(f"'{host}' is neither an address nor a host name", param="host") from error


def _write(files: Certificates, name: str, certificate: x509.Certificate, key: EllipticCurvePrivateKey) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    handle = os.open(files.key(name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(secret)
    files.certificate(name).write_bytes(certificate.public_bytes(Encoding.PEM))
