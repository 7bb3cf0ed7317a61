"""TLS with client certificates, and passwords, on a real etcd."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from llmos.clock import SystemClock
from llmos.errors import ConfigError, EtcdAuthFailed, EtcdUnavailable
from llmos.etcd import EtcdClient, EtcdConfig
from tests.fakes.etcd_server import EtcdServer, ServerTls
from tests.integration.etcd.collect import Collector
from tests.integration.etcd.conftest import OpenClient

_USER, _PASSWORD = "llmos", "correct horse"


@dataclass(frozen=True)
class Authority:
    """A certificate authority of the test, writing into `folder`."""

    folder: Path
    name: str
    key: ec.EllipticCurvePrivateKey

    @property
    def ca_file(self) -> Path:
        return self.folder / f"{self.name}-ca.pem"

    def issue(self, subject: str) -> tuple[Path, Path]:
        """Certificate and key file, good for both ends of a connection on loopback."""
        key = ec.generate_private_key(ec.SECP256R1())
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = (
            _builder(subject, self.name, key)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
            )
        )
        cert_file, key_file = self.folder / f"{self.name}-{subject}.pem", self.folder / f"{self.name}-{subject}.key"
        cert_file.write_bytes(builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return cert_file, key_file


def _builder(subject: str, issuer: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=1))
    )


def make_authority(folder: Path, name: str) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(name, name, key).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    authority = Authority(folder, name, key)
    authority.ca_file.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return authority


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return make_authority(tmp_path, "ours")


@pytest.fixture
def tls_server(tmp_path: Path, authority: Authority) -> Iterator[EtcdServer]:
    cert_file, key_file = authority.issue("server")
    with EtcdServer(tmp_path / "etcd", tls=ServerTls(authority.ca_file, cert_file, key_file)) as running:
        yield running


def tls_client(server: EtcdServer, ca: Authority, identity: Authority, call_timeout_s: float = 3.0) -> EtcdClient:
    cert_file, key_file = identity.issue("client")
    config = EtcdConfig(
        endpoints=(f"https://{server.address}",),
        ca_file=ca.ca_file,
        cert_file=cert_file,
        key_file=key_file,
        call_timeout_s=call_timeout_s,
    )
    return EtcdClient(config, clock=SystemClock(), rng=random.Random(7))


async def test_tls_with_certificates_on_both_sides(tls_server: EtcdServer, authority: Authority) -> None:
    async with tls_client(tls_server, authority, authority) as client, Collector(client.watch("")) as seen:
        async with await client.lease(5) as lease:
            await client.put("k", b"v", lease.id)
            await seen.until("k", b"v")
        await seen.until("k", None)


async def test_tls_refuses_strangers_on_either_side(
    tls_server: EtcdServer, authority: Authority, tmp_path: Path
) -> None:
    stranger = make_authority(tmp_path, "stranger")
    for client in (
        tls_client(tls_server, stranger, authority, call_timeout_s=0.5),
        tls_client(tls_server, authority, stranger, call_timeout_s=0.5),
        EtcdClient(
            EtcdConfig(endpoints=(tls_server.address,), call_timeout_s=0.5), clock=SystemClock(), rng=random.Random(7)
        ),
    ):
        async with client:
            with pytest.raises(EtcdUnavailable):
                await client.put("k", b"v")
    async with tls_client(tls_server, authority, authority) as client:
        assert await client.get("k") is None


async def test_missing_tls_file_is_a_config_error(tmp_path: Path) -> None:
    config = EtcdConfig(endpoints=("127.0.0.1:1",), ca_file=tmp_path / "absent.pem")
    with pytest.raises(ConfigError):
        async with EtcdClient(config, clock=SystemClock(), rng=random.Random(7)):
            raise AssertionError("it opened")


async def test_password(server: EtcdServer, open_client: OpenClient) -> None:
    await asyncio.to_thread(server.enable_auth, _USER, _PASSWORD, "/llmos/")
    async with open_client(user=_USER, password=_PASSWORD) as client:
        async with Collector(client.watch("/llmos/")) as seen, await client.lease(5) as lease:
            await client.put("/llmos/k", b"v", lease.id)
            await seen.until("/llmos/k", b"v")
            assert await client.compare_and_swap("/llmos/c", 0, b"v")
        with pytest.raises(EtcdAuthFailed):
            await client.put("/other/k", b"v")
        async with client.watch("/other/", start_revision=1) as watch:
            with pytest.raises(EtcdAuthFailed):
                await anext(watch)


@pytest.mark.parametrize(
    "credentials",
    [
        pytest.param({}, id="none"),
        pytest.param({"user": _USER, "password": "wrong"}, id="wrong password"),
        pytest.param({"user": "nobody", "password": _PASSWORD}, id="unknown user"),
    ],
)
async def test_bad_credentials(server: EtcdServer, open_client: OpenClient, credentials: dict[str, str]) -> None:
    await asyncio.to_thread(server.enable_auth, _USER, _PASSWORD, "/llmos/")
    async with open_client(**credentials) as client:
        with pytest.raises(EtcdAuthFailed):
            await client.get("/llmos/k")
        with pytest.raises(EtcdAuthFailed):
            await client.txn([], [])
        async with client.watch("/llmos/", start_revision=1) as watch:
            with pytest.raises(EtcdAuthFailed):
                await anext(watch)


async def test_all_goes_on_after_a_restart(server: EtcdServer, open_client: OpenClient) -> None:
    await asyncio.to_thread(server.enable_auth, _USER, _PASSWORD, "/llmos/")
    async with (
        open_client(user=_USER, password=_PASSWORD, call_timeout_s=10.0) as client,
        Collector(client.watch("/llmos/")) as seen,
    ):
        await client.put("/llmos/k", b"1")
        await seen.until("/llmos/k", b"1")
        await asyncio.to_thread(server.restart)
        await asyncio.to_thread(server.forget_tokens)
        async with Collector(client.watch("/llmos/", start_revision=1)) as replayed:
            assert await client.compare_and_swap("/llmos/c", 0, b"v")
            await client.put("/llmos/k", b"2")
            await seen.until("/llmos/k", b"2")
            await replayed.until("/llmos/k", b"2")
        assert seen.snapshots == 1


async def test_watch_with_an_expired_token_gets_a_new_one(server: EtcdServer, open_client: OpenClient) -> None:
    """etcd reports it as a missing permission, inside the stream."""
    await asyncio.to_thread(server.enable_auth, _USER, _PASSWORD, "/llmos/")
    async with open_client(user=_USER, password=_PASSWORD) as client:
        revision = await client.put("/llmos/k", b"1")
        await asyncio.to_thread(server.forget_tokens)
        async with client.watch("/llmos/", start_revision=revision) as watch, asyncio.timeout(20):
            assert (await anext(watch)).events[0].value == b"1"


async def test_calls_with_an_expired_token_get_a_new_one(server: EtcdServer, open_client: OpenClient) -> None:
    await asyncio.to_thread(server.enable_auth, _USER, _PASSWORD, "/llmos/")
    async with open_client(user=_USER, password=_PASSWORD) as client:
        await client.put("/llmos/k", b"1")
        await asyncio.to_thread(server.forget_tokens)
        assert await client.get("/llmos/k") is not None
        await asyncio.to_thread(server.forget_tokens)
        assert await client.compare_and_swap("/llmos/c", 0, b"v")


async def test_user_is_harmless_where_no_password_is_asked_for(server: EtcdServer, open_client: OpenClient) -> None:
    async with open_client(user=_USER, password=_PASSWORD) as client:
        await client.put("k", b"v")
        async with client.watch("k") as watch:
            assert (await anext(watch)).events[0].value == b"v"
