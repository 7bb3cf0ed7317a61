"""Gateways, scheduler and workers over real gRPC, membership in a real etcd."""

from __future__ import annotations

import asyncio
from pathlib import Path

from llmos.etcd import EtcdClient
from llmos.internal.v1 import request_pb2
from llmos.v1 import inference_pb2
from scheduler.process import SchedulerProcess
from tests.fakes.certificates import make_authority
from tests.fakes.contract import make_request, token
from tests.fakes.gateway import FakeGateway
from tests.fakes.worker import FakeWorker, worker_in
from tests.integration.scheduler.conftest import OpenScheduler, address, until


async def test_many_requests_on_two_workers(scheduler: SchedulerProcess, etcd: EtcdClient) -> None:
    async with (
        worker_in(etcd, "w1", blocks=8) as one,
        worker_in(etcd, "w2", blocks=8) as two,
        FakeGateway("g1", [address(scheduler)]) as gateway,
    ):
        await gateway.ready()
        clients = [
            await gateway.submit(make_request(f"r{i}", prompt=5 + i, max_tokens=10 + i % 30, choices=1 + i % 3))
            for i in range(40)
        ]
        await gateway.ended(*clients)
        assert all(all(client.finished) for client in clients)
        assert one.dispatches
        assert two.dispatches
        assert scheduler.seat.reign is not None
        assert not scheduler.seat.reign.core.state.requests


async def test_frames_are_acknowledged_to_the_worker(scheduler: SchedulerProcess, etcd: EtcdClient) -> None:
    async with worker_in(etcd, "w1") as worker, FakeGateway("g1", [address(scheduler)]) as gateway:
        await gateway.ready()
        await gateway.ended(await gateway.submit(make_request("r1", max_tokens=100)))
        await until(lambda: worker.acknowledged >= 100)


async def test_worker_killed_under_streams(scheduler: SchedulerProcess, etcd: EtcdClient) -> None:
    async with (
        worker_in(etcd, "w1", step_s=0.01) as victim,
        worker_in(etcd, "w2", step_s=0.01),
        FakeGateway("g1", [address(scheduler)]) as gateway,
    ):
        await gateway.ready()
        clients = [await gateway.submit(make_request(f"r{i}", max_tokens=60)) for i in range(8)]
        await gateway.until(lambda: all(len(client.tokens[0]) > 5 for client in clients))
        await victim.kill()
        await gateway.ended(*clients)
        assert [client.finished for client in clients] == [[True]] * 8
        assert len(victim.dispatches) > 0


async def test_frozen_worker_is_left_and_its_late_output_refused(
    open_scheduler: OpenScheduler, etcd: EtcdClient
) -> None:
    async with (
        open_scheduler(worker_silence_s=0.6) as scheduler,
        worker_in(etcd, "w1", step_s=0.01) as frozen,
        FakeGateway("g1", [address(scheduler)]) as gateway,
    ):
        await gateway.ready()
        clients = [await gateway.submit(make_request(f"r{i}", max_tokens=80)) for i in range(4)]
        await gateway.until(lambda: all(len(client.tokens[0]) > 5 for client in clients))
        frozen.freeze()
        async with worker_in(etcd, "w2", step_s=0.002) as other:
            await until(lambda: len(other.dispatches) == 4)
            frozen.thaw()
            await gateway.ended(*clients)
            assert [client.finished for client in clients] == [[True]] * 4
            await until(lambda: not frozen.sim.running)


async def test_broken_worker_stream_is_mended(scheduler: SchedulerProcess, etcd: EtcdClient) -> None:
    async with worker_in(etcd, "w1", step_s=0.005) as worker, FakeGateway("g1", [address(scheduler)]) as gateway:
        await gateway.ready()
        client = await gateway.submit(make_request("r1", max_tokens=100))
        for _ in range(3):
            tokens = len(client.tokens[0])
            await gateway.until(lambda tokens=tokens: len(client.tokens[0]) > tokens + 5)  # type: ignore[misc]
            worker.break_stream()
        await gateway.ended(client)
        assert client.finished == [True]
        assert len(worker.terms) >= 4


async def test_gateway_reconnects_and_misses_nothing(scheduler: SchedulerProcess, etcd: EtcdClient) -> None:
    async with worker_in(etcd, "w1", step_s=0.005) as worker, FakeGateway("g1", [address(scheduler)]) as gateway:
        await gateway.ready()
        clients = [await gateway.submit(make_request(f"r{i}", max_tokens=150)) for i in range(4)]
        for _ in range(3):
            seen = len(clients[0].tokens[0])
            await gateway.until(lambda seen=seen: len(clients[0].tokens[0]) > seen + 10)  # type: ignore[misc]
            await gateway.disconnect()
        await gateway.ended(*clients)
        assert gateway.connects >= 3
        assert len({dispatch.request.request_id for dispatch in worker.dispatches}) == 4
        assert [client.finished for client in clients] == [[True]] * 4


async def test_gateway_gone_frees_the_worker(scheduler: SchedulerProcess, etcd: EtcdClient) -> None:
    async with worker_in(etcd, "w1", step_s=0.01) as worker:
        async with FakeGateway("g1", [address(scheduler)]) as gateway:
            await gateway.ready()
            await gateway.submit(make_request("r1", max_tokens=1000))
            await until(lambda: "r1" in worker.sim.running)
        await until(lambda: not worker.sim.running)


async def test_cancel_reaches_the_worker(scheduler: SchedulerProcess, etcd: EtcdClient) -> None:
    async with worker_in(etcd, "w1", step_s=0.01) as worker, FakeGateway("g1", [address(scheduler)]) as gateway:
        await gateway.ready()
        await gateway.submit(make_request("r1", max_tokens=1000))
        await until(lambda: "r1" in worker.sim.running)
        await gateway.cancel("r1")
        await until(lambda: not worker.sim.running)


async def test_gateway_that_does_not_acknowledge_gets_folded_frames(
    scheduler: SchedulerProcess, etcd: EtcdClient
) -> None:
    async with worker_in(etcd, "w1", step_s=0.001) as worker, FakeGateway("g1", [address(scheduler)]) as gateway:
        await gateway.ready()
        gateway.acknowledging = False
        client = await gateway.submit(make_request("r1", max_tokens=900))
        await until(lambda: bool(worker.dispatches) and not worker.sim.running)
        assert len(client.tokens[0]) < 900
        assert client.tokens[0] == [token("r1", 0, i) for i in range(len(client.tokens[0]))]
        gateway.acknowledging = True
        await gateway.disconnect()
        await gateway.ended(client)
        assert len(client.tokens[0]) == 900


async def test_slow_gateway_does_not_hold_up_another(scheduler: SchedulerProcess, etcd: EtcdClient) -> None:
    async with (
        worker_in(etcd, "w1", step_s=0.001),
        FakeGateway("slow", [address(scheduler)]) as slow,
        FakeGateway("fast", [address(scheduler)]) as fast,
    ):
        await slow.ready()
        await fast.ready()
        slow.pause()
        waiting = await slow.submit(make_request("r-slow", max_tokens=800))
        running = await fast.submit(make_request("r-fast", max_tokens=800))
        await fast.ended(running)
        slow.resume()
        await slow.ended(waiting)
        assert running.finished == waiting.finished == [True]


async def test_overload_is_refused_and_passes(open_scheduler: OpenScheduler, etcd: EtcdClient) -> None:
    async with (
        open_scheduler(queue_limit=5) as scheduler,
        worker_in(etcd, "w1", blocks=1) as worker,
        FakeGateway("g1", [address(scheduler)]) as gateway,
    ):
        await gateway.ready()
        worker.freeze()
        clients = [await gateway.submit(make_request(f"r{i}")) for i in range(10)]
        await gateway.until(lambda: [client.error for client in clients].count("overloaded") == 4)
        worker.thaw()
        await gateway.ended(*clients)
        assert [client.finished for client in clients].count([True]) == 6


async def test_model_appears_and_disappears_in_the_catalogue(open_scheduler: OpenScheduler, etcd: EtcdClient) -> None:
    async with (
        open_scheduler(no_worker_grace_s=0.5) as scheduler,
        FakeGateway("g1", [address(scheduler)]) as gateway,
    ):
        await gateway.until(lambda: gateway.sim.catalogue is not None)
        async with worker_in(etcd, "w1", loaded=False) as worker:
            await gateway.ready()
            loads = [command.load for command in worker.commands if command.WhichOneof("order") == "load"]
            assert [(load.model, load.device_id) for load in loads] == [("m", "cpu")]
        await gateway.until(lambda: gateway.sim.catalogue is not None and not gateway.sim.catalogue.models)


async def test_worker_of_the_same_address_but_another_name_is_not_taken_for_it(
    scheduler: SchedulerProcess, etcd: EtcdClient
) -> None:
    async with FakeWorker("impostor") as impostor, worker_in(etcd, "w1") as worker:
        impostor.sim.id = "somebody-else"
        await impostor.register(etcd)
        await until(lambda: bool(worker.terms))
        await until(lambda: bool(impostor.terms))
        assert scheduler.seat.reign is not None
        workers = scheduler.seat.reign.core.state.workers
        await until(lambda: workers["w1"].connected)  # a connection may fail and be tried again
        assert not workers["impostor"].connected


async def test_damaged_frame_breaks_the_stream_not_the_request(scheduler: SchedulerProcess, etcd: EtcdClient) -> None:
    async with worker_in(etcd, "w1", step_s=0.005) as worker, FakeGateway("g1", [address(scheduler)]) as gateway:
        await gateway.ready()
        client = await gateway.submit(make_request("r1", max_tokens=60))
        await gateway.until(lambda: len(client.tokens[0]) > 5)
        worker.sim.sequence += 7
        await until(lambda: len(worker.terms) == 2)
        await gateway.ended(client)
        assert client.finished == [True]


async def test_finish_reason_of_the_worker_reaches_the_gateway(scheduler: SchedulerProcess, etcd: EtcdClient) -> None:
    async with worker_in(etcd, "w1") as worker, FakeGateway("g1", [address(scheduler)]) as gateway:
        await gateway.ready()
        seen: list[request_pb2.Output] = []
        take = gateway.sim.take

        def spy(message: request_pb2.Output | request_pb2.Failure) -> None:
            if isinstance(message, request_pb2.Output):
                seen.append(message)
            take(message)

        gateway.sim.take = spy  # type: ignore[method-assign]
        await gateway.ended(await gateway.submit(make_request("r1", max_tokens=3)))
        assert seen[-1].finish_reason == inference_pb2.FINISH_REASON_LENGTH
        assert {(output.epoch.term, output.epoch.attempt) for output in seen} == {(worker.terms[0], 1)}
        await asyncio.sleep(0)


async def test_gateway_that_takes_nothing_is_cut_off_and_comes_back(
    open_scheduler: OpenScheduler, etcd: EtcdClient
) -> None:
    async with (
        open_scheduler(gateway_buffer_bytes=2_000) as scheduler,
        worker_in(etcd, "w1", blocks=600, step_s=0.001),
        FakeGateway("g1", [address(scheduler)]) as gateway,
    ):
        await gateway.ready()
        gateway.acknowledging = False
        clients = [await gateway.submit(make_request(f"r{i}", max_tokens=200)) for i in range(100)]
        assert scheduler.seat.reign is not None
        desk = scheduler.seat.reign.gateways
        await until(lambda: desk.overflows > 0)
        gateway.acknowledging = True
        await gateway.ended(*clients, timeout_s=60)
        assert [client.finished for client in clients] == [[True]] * 100


async def test_everything_over_mutual_tls(open_scheduler: OpenScheduler, etcd: EtcdClient, tmp_path: Path) -> None:
    tls = make_authority(tmp_path / "ca")
    async with (
        open_scheduler(tls=tls) as scheduler,
        worker_in(etcd, "w1", tls=tls),
        FakeGateway("g1", [address(scheduler)], tls=tls) as gateway,
    ):
        await gateway.ready()
        client = await gateway.submit(make_request("r1", max_tokens=20))
        await gateway.ended(client)
        assert client.finished == [True]
