"""What schedulers are told of prefix caches."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from llmos.internal.v1 import work_pb2
from tests.unit.worker.rig import FakeStream, Rig, batch, hello
from worker import cache_view
from worker.cache_view import CacheView


def change(
    number: int, stored: Sequence[int] = (), removed: Sequence[int] = (), model: str = "m"
) -> work_pb2.CacheChange:
    return work_pb2.CacheChange(model=model, number=number, stored=stored, removed=removed)


def test_a_stream_hears_all_and_then_what_changes() -> None:
    view = CacheView()
    view.change(change(1, [1, 2, 3]))
    view.change(change(2, [4], [2]))
    assert list(view.take()) == [change(1, [1, 3, 4])]
    view.change(change(3, [5], [1]))
    view.change(change(4, [1], [5]))
    assert list(view.take()) == []
    view.change(change(5, [6], [3]))
    assert list(view.take()) == [change(2, [6], [3])]
    view.attach()
    [told] = view.take()
    assert (told.number, sorted(told.stored), list(told.removed)) == (1, [1, 4, 6], [])


def test_a_cache_laid_out_anew_or_lost_is_empty() -> None:
    view = CacheView()
    view.change(change(1, [1, 2]))
    view.change(change(1, [9], model="other"))
    list(view.take())
    view.change(change(1, [2, 3]))
    view.forget("other")
    assert list(view.take()) == [change(2, [3], [1]), change(2, [], [9], model="other")]
    view.forget_all()
    view.attach()
    assert list(view.take()) == []


def test_a_large_cache_goes_in_several_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_view, "HASHES_PER_FRAME", 3)
    view = CacheView()
    view.change(change(1, [1, 2, 3, 4]))
    view.change(change(1, [7, 8], model="other"))
    frames = [list(view.take()) for _ in range(3)]
    assert frames == [[change(1, [1, 2, 3])], [change(2, [4]), change(1, [7, 8], model="other")], []]


def test_frames_carry_it_and_a_new_scheduler_hears_all_again() -> None:
    rig = Rig()
    rig.core.engine_frame(work_pb2.WorkFrame(cache=[change(1, [1, 2], model="echo")]))
    assert list(rig.core.next_frame().cache) == [change(1, [1, 2], model="echo")]
    assert not rig.core.next_frame().cache
    rig.core.attach(batch(hello(), term=2), FakeStream(2))
    assert list(rig.core.next_frame().cache) == [change(1, [1, 2], model="echo")]
    rig.core.engine_lost("signal 9")
    assert list(rig.core.next_frame().cache) == [change(2, [], [1, 2], model="echo")]


def test_a_scheduler_that_missed_a_change_hears_all_again() -> None:
    rig = Rig()
    rig.core.engine_frame(work_pb2.WorkFrame(cache=[change(1, [1, 2], model="echo"), change(1, [7], model="other")]))
    assert len(rig.core.next_frame().cache) == 2
    rig.core.engine_frame(work_pb2.WorkFrame(cache=[change(2, [3], [1], model="echo")]))
    rig.send(work_pb2.Command(resend_cache=work_pb2.ResendCache(model="echo")))
    assert rig.stream.wakes
    assert list(rig.core.next_frame().cache) == [change(1, [2, 3], model="echo")]
    rig.send(work_pb2.Command(resend_cache=work_pb2.ResendCache(model="nothing")))
    assert not rig.core.next_frame().cache
    rig.core.engine_frame(work_pb2.WorkFrame(cache=[change(3, [4], model="echo")]))
    assert list(rig.core.next_frame().cache) == [change(2, [4], model="echo")]
