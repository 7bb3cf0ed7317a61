"""Services in network namespaces of their own behind one router, which can forget the way to one of them, or from it.

    root namespace (clients, gateways, etcd) -- router -- one namespace per scheduler and worker

What the router drops is dropped in silence, as a broken switch does it: no RST, no ICMP.
"""

from __future__ import annotations

import ipaddress
import itertools
import os
import subprocess
from dataclasses import dataclass

from tests.faults.ledger import Ledger

_runs = itertools.count()


@dataclass(frozen=True, slots=True)
class Place:
    """A namespace and the address of who lives in it."""

    namespace: str
    address: str

    @property
    def wrap(self) -> tuple[str, ...]:
        """What to put before a command so that it runs there."""
        return ("ip", "netns", "exec", self.namespace)


class Apart:
    """Owns the router. Everything is gone with the ledger: links end with the namespaces at their ends."""

    def __init__(self, ledger: Ledger, names: list[str]) -> None:
        """A place for each of `names`. Raises RuntimeError with what the kernel said."""
        run = next(_runs)
        self._ledger = ledger
        self._prefix = f"llmos-faults-{os.getpid()}-{run}"
        self._router = f"{self._prefix}-router"
        self._net = ipaddress.ip_network(f"10.{128 + (os.getpid() + run) % 100}.0.0/16")
        self._add(self._router)
        _ip("netns", "exec", self._router, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
        self.root = self._link(0, "", f"lf{os.getpid() % 100_000}-{run}")
        """Address of the root namespace, as the others see it."""
        _ip("route", "add", str(self._net), "via", self._gate(0))
        self.places = {name: self._place(number, name) for number, name in enumerate(names, 1)}

    @property
    def addresses(self) -> list[str]:
        """Of everybody."""
        return [self.root, *(place.address for place in self.places.values())]

    def cut(self, name: str, way: str) -> None:
        """Nothing reaches `name` any more (`in`), or nothing of it reaches others (`out`)."""
        address = self.places[name].address
        if way == "in":
            _ip("-n", self._router, "route", "add", "blackhole", f"{address}/32")
        else:
            _ip("-n", self._router, "rule", "add", "from", address, "blackhole", "pref", "100")

    def mend(self) -> None:
        """All ways are known again."""
        for place in self.places.values():
            subprocess.run(
                ["ip", "-n", self._router, "route", "del", "blackhole", f"{place.address}/32"],
                capture_output=True,
                timeout=30,
                check=False,
            )
        subprocess.run(
            ["ip", "-n", self._router, "rule", "flush", "pref", "100"], capture_output=True, timeout=30, check=False
        )

    def _place(self, number: int, name: str) -> Place:
        namespace = f"{self._prefix}-{name}"
        self._add(namespace)
        address = self._link(number, namespace, "up0")
        _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("-n", namespace, "route", "add", "default", "via", self._gate(number))
        return Place(namespace, address)

    def _add(self, namespace: str) -> None:
        self._ledger.note("netns", namespace)
        _ip("netns", "add", namespace)

    def _gate(self, number: int) -> str:
        """The router's address on a link."""
        return str(self._net[256 * number + 1])

    def _link(self, number: int, namespace: str, device: str) -> str:
        """A link between the router and a namespace; empty: the root's. Returns the address at the far end."""
        where = ("-n", namespace) if namespace else ()
        address, far = str(self._net[256 * number + 2]), f"down{number}"
        _ip(*where, "link", "add", device, "type", "veth", "peer", "name", far, "netns", self._router)
        _ip(*where, "addr", "add", f"{address}/30", "dev", device)
        _ip(*where, "link", "set", device, "up")
        _ip("-n", self._router, "addr", "add", f"{self._gate(number)}/30", "dev", far)
        _ip("-n", self._router, "link", "set", far, "up")
        return address


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
