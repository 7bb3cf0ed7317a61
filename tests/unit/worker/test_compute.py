"""Which processor `--device` means."""

from __future__ import annotations

import logging
import subprocess
from importlib import metadata
from typing import Any
from unittest.mock import Mock

import pytest

from llmos.errors import ConfigError
from worker import compute
from worker.compute import CARD_SHARE, Place, choose
from worker.nvml import Gpu

CARDS = [Gpu("GPU-1", "Big", 80 << 30), Gpu("GPU-2", "Small", 24 << 30)]


def two() -> list[Gpu]:
    return CARDS


def both() -> list[str]:
    return ["1", "2"]


def none() -> list[str]:
    return []


def one(device: str, place: Place = Place()) -> Gpu | None:  # noqa: B008 - frozen
    return choose("torch", device, place, two, both)


@pytest.mark.parametrize(("device", "card"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_card_is_chosen_by_its_number(device: str, card: int) -> None:
    chosen = one(device)
    assert chosen is not None
    assert (chosen.uuid, chosen.memory_bytes) == (CARDS[card].uuid, int(CARDS[card].memory_bytes * CARD_SHARE))


def test_the_main_processor_is_no_card() -> None:
    assert one("cpu") is None


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_workers_are_dealt_out_to_the_cards_and_share_them(device: str) -> None:
    chosen = [one(device, Place.parse(f"{number}/3")) for number in (1, 2, 3)]
    assert [card.uuid for card in chosen if card] == ["GPU-1", "GPU-2", "GPU-1"]
    whole = [int(card.memory_bytes * CARD_SHARE) for card in CARDS]
    assert [card.memory_bytes for card in chosen if card] == [whole[0] // 2, whole[1], whole[0] // 2]


def test_all_workers_on_one_card_share_it() -> None:
    chosen = one("cuda:1", Place.parse("2/4"))
    assert chosen is not None
    assert chosen.memory_bytes == int(CARDS[1].memory_bytes * CARD_SHARE) // 4


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "a/b", "-1/2", "1/2/3"])
def test_a_place_that_there_is_not_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="2/4"):
        Place.parse(text)


def test_auto_is_the_main_processor_where_there_is_no_card() -> None:
    usable = Mock()
    assert choose("torch", "auto", Place(), list, usable) is None
    usable.assert_not_called()


def test_auto_says_that_torch_cannot_use_the_card(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert choose("torch", "auto", Place(), two, none) is None
    assert "Big" in caplog.text


def test_cards_are_numbered_as_torch_numbers_them_and_others_left_out() -> None:
    other_way = ["2", "1"]
    assert [choose("torch", f"cuda:{n}", Place(), two, lambda: other_way) for n in (0, 1)] == [
        choose("torch", f"cuda:{n}", Place(), two, both) for n in (1, 0)
    ]
    only = choose("torch", "cuda", Place.parse("2/2"), two, lambda: ["2"])
    assert only is not None
    assert only.uuid == "GPU-2"
    with pytest.raises(ConfigError, match="on 1 graphics"):
        choose("torch", "cuda:1", Place(), two, lambda: ["2"])


def test_a_torch_that_knows_no_uuids_is_taken_at_its_word() -> None:
    chosen = choose("torch", "cuda:1", Place(), two, lambda: ["", ""])
    assert chosen is not None
    assert chosen.uuid == "GPU-2"


@pytest.mark.parametrize("device", ["abacus", "cuda:", "cuda:-1", "cuda:x", "CUDA", ""])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="known: auto, cpu, cuda, cuda:N"):
        one(device)


@pytest.mark.parametrize(("device", "cards"), [("cuda", list), ("cuda:2", two)])
def test_a_card_that_is_not_there_is_refused(device: str, cards: Mock) -> None:
    with pytest.raises(ConfigError, match=r"shows no|on 2 graphics"):
        choose("torch", device, Place(), cards, both)


def test_a_card_that_torch_cannot_use_is_refused() -> None:
    with pytest.raises(ConfigError, match="torch cannot compute on"):
        choose("torch", "cuda:1", Place(), two, none)


def test_echo_computes_on_no_card() -> None:
    assert choose("echo", "cuda", Place(), two, both) is None


def trial(monkeypatch: pytest.MonkeyPatch, **run: object) -> None:
    monkeypatch.setattr(compute, "torch_may_use_them", lambda: True)
    monkeypatch.setattr(subprocess, "run", Mock(**run))


def test_a_build_for_the_main_processor_needs_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "2.13.0+cpu")
    monkeypatch.setattr(subprocess, "run", Mock(side_effect=AssertionError))
    assert compute.usable_cards() == ()


def test_without_torch_there_is_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", Mock(side_effect=metadata.PackageNotFoundError))
    assert compute.usable_cards() == ()


def test_torch_is_tried_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    trial(monkeypatch, return_value=Mock(stdout=b'["1", "2"]\n', stderr=b""))
    assert compute.usable_cards() == ("1", "2")


@pytest.mark.parametrize("said", [b"", b"Segmentation fault", b"{}"])
def test_a_trial_that_fails_says_why(said: bytes, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    trial(monkeypatch, return_value=Mock(stdout=said, stderr=b"no C compiler"))
    assert compute.usable_cards() == ()
    assert "no C compiler" in caplog.text


def test_a_trial_without_an_end_counts_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    trial(monkeypatch, side_effect=subprocess.TimeoutExpired("torch", 1))
    assert compute.usable_cards() == ()
