"""What a command plans, what a client that comes back asks for, and what is said of many random faults."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from tests.faults import page, report, rows
from tests.faults.clients import Streamed
from tests.faults.plan import planned
from tests.faults.scenario import MIX, Result, on_torch
from tests.faults.verdict import Counts


def test_half_of_the_random_faults_are_on_torch_with_every_kind_of_request() -> None:
    every = [one for one, _ in planned(quick=False, seeds=10, first=3, only="random single")]
    real = [one for one in every if one.shape.torch]
    assert (len(every), len(real)) == (10, 5)
    assert all(one.load.kinds == MIX and one.load.unknown for one in real)
    assert len({one.name for one in every}) == 10


def test_the_same_seed_is_the_same_fault() -> None:
    first, again = (planned(quick=False, seeds=8, first=0, only="random") for _ in range(2))
    assert [[event.what for event in one.events] for one, _ in first] == [
        [event.what for event in one.events] for one, _ in again
    ]


def test_names_are_unique_and_one_shape_follows_the_other() -> None:
    every = rows.every()
    assert len({one.name for one in every}) == len(every)
    shapes = [one.shape for one in every]
    assert sum(a != b for a, b in itertools.pairwise(shapes)) == len(set(shapes)) - 1


def test_what_needs_the_echo_backend_is_not_run_on_torch() -> None:
    names = {one.name for one, _ in planned(quick=False, seeds=0, first=0, only="", backend="torch")}
    assert "worker killed (torch)" in names
    assert not any("query of death" in name for name in names)
    killed = next(one for one in rows.every() if one.name == "worker killed")
    assert (real := on_torch(killed)) is not None
    assert real.shape.torch


@pytest.mark.parametrize("seed", range(4))
def test_who_returns_forgets_what_lies_behind_the_offset(seed: int) -> None:
    stream = Streamed({}, 0, {0: "abcd"}, returning=True)
    for number, text in enumerate("abc"):
        choice = {"index": 0, "text": text, "finish_reason": None}
        for line in (f"id: {number}", f"data: {json.dumps({'choices': [choice]})}", ""):
            stream.take(line)
    stream.go_back(random.Random(seed))
    assert stream.texts[0] == "abc"[: int(stream.last_event_id) + 1]
    assert stream.broken
    assert not stream.times_s


def test_what_was_run_is_on_the_page_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "PAGE", tmp_path / "faults.md")
    gaps = [0.1] * 9 + [3.0]
    names = ("random single fault 0", "random single fault 1 (torch)")
    results = [
        Result(name, report.SINGLES, 0, Counts(injected=1), {"gap_s": 3.0, "answers_pct": -1.5}, gaps=gaps)
        for name in names
    ]
    saved = tmp_path / "run.json"
    saved.write_text(json.dumps(report.as_json(results, 12.0)))
    read, wall_s = page.read([saved])
    assert wall_s == 12.0
    assert [(one.name, one.times, one.gaps) for one in read] == [(one.name, one.times, one.gaps) for one in results]
    page.write(read, wall_s)
    text = page.PAGE.read_text()
    assert "added gap echo p50 s: 0.1" in text
    assert "added gap torch p99 s: 3" in text
    assert "-1.5 %" in text
