from __future__ import annotations

from pathlib import Path

import pytest

from llmos.errors import ConfigError
from llmos.fleet.detach import decode_options, encode_options
from llmos.fleet.options import FleetOptions, Share, free_memory, share_of, usable_cores
from llmos.fleet.plan import ServicePlan

OPTIONS = FleetOptions(data_dir=Path("/d"), model="m")


def flags(command: list[str]) -> dict[str, str]:
    start = command.index("-m") + 2
    return dict(zip(command[start::2], command[start + 1 :: 2], strict=True))


@pytest.mark.parametrize(("workers", "cores", "threads"), [(1, 8, 8), (3, 8, 2), (8, 8, 1), (16, 8, 1)])
def test_cores_are_split_evenly_and_never_to_nothing(workers: int, cores: int, threads: int) -> None:
    assert share_of(workers, cores, 0).threads == threads


def test_memory_is_split_and_a_tenth_stays_free() -> None:
    assert share_of(2, 2, 1000).memory_bytes == 450


def test_this_machine_has_something_to_share() -> None:
    assert usable_cores() >= 1
    assert free_memory() > 0


@pytest.mark.parametrize("bad", [{"workers": 0}, {"gateways": 65}, {"http_port": 65_536}, {"grpc_port": -1}])
def test_bounds(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        FleetOptions(data_dir=Path("/d"), **bad)  # type: ignore[arg-type]


def test_options_survive_the_way_to_the_detached_supervisor() -> None:
    options = FleetOptions(
        data_dir=Path("/d"), etcd=("a:1", "b:2"), store=Path("/s"), http_port=0, echo_tokens_per_second=2.5
    )
    assert decode_options(encode_options(options)) == options


def test_a_worker_gets_its_share() -> None:
    given = flags(ServicePlan(OPTIONS, Share(3, 1_000)).worker("worker-1", ["a:1", "b:2"]))
    assert given["--threads"] == "3"
    assert given["--memory-limit"] == "1000"
    assert given["--etcd-endpoints"] == "a:1,b:2"
    assert given["--ready-file"] == "/d/ready/worker-1.json"
    assert given["--host"] == "127.0.0.1"
    assert "--store" not in given
    assert (given["--device"], given["--place"]) == ("auto", "1/1")


def test_workers_know_which_one_they_are_and_where_they_compute() -> None:
    options = FleetOptions(data_dir=Path("/d"), workers=3, device="cuda")
    given = flags(ServicePlan(options, Share(1, 1)).worker("worker-2", []))
    assert (given["--device"], given["--place"]) == ("cuda", "2/3")


@pytest.mark.parametrize("device", ["", "gpu", "cuda:", "cuda:x"])
def test_an_unknown_device_is_refused_before_anything_starts(device: str) -> None:
    with pytest.raises(ConfigError, match="--device is auto, cpu, cuda or cuda:N"):
        FleetOptions(data_dir=Path("/d"), device=device)


def test_a_gateway_gets_schedulers_ports_and_keys() -> None:
    options = FleetOptions(data_dir=Path("/d"), keys_file=Path("/k"))
    given = flags(ServicePlan(options, Share(1, 1)).gateway("gateway-1", ["h:1", "h:2"], 7, 0))
    assert given["--schedulers"] == "h:1,h:2"
    assert (given["--http-fd"], given["--grpc-port"]) == ("7", "0")
    assert given["--keys-file"] == "/k"
