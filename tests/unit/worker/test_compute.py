"""Which processor `--device` means."""

from __future__ import annotations

import logging
from importlib import metadata
from unittest.mock import Mock

import pytest

from llmos.errors import ConfigError
from worker import compute
from worker.compute import MODEL_SHARE, Place, choose
from worker.nvml import Gpu

CARDS = [Gpu("GPU-1", "Big", 80 << 30), Gpu("GPU-2", "Small", 24 << 30)]


def two() -> list[Gpu]:
    return CARDS


def yes() -> bool:
    return True


def no() -> bool:
    return False


def one(device: str, place: Place = Place()) -> Gpu | None:  # noqa: B008 - frozen
    return choose("torch", device, place, two, yes)


@pytest.mark.parametrize(("device", "card"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_card_is_chosen_by_its_number(device: str, card: int) -> None:
    chosen = one(device)
    assert chosen is not None
    assert (chosen.uuid, chosen.memory_bytes) == (CARDS[card].uuid, int(CARDS[card].memory_bytes * MODEL_SHARE))


def test_the_main_processor_is_no_card() -> None:
    assert one("cpu") is None


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_workers_are_dealt_out_to_the_cards_and_share_them(device: str) -> None:
    chosen = [one(device, Place.parse(f"{number}/3")) for number in (1, 2, 3)]
    assert [card.uuid for card in chosen if card] == ["GPU-1", "GPU-2", "GPU-1"]
    whole = [int(card.memory_bytes * MODEL_SHARE) for card in CARDS]
    assert [card.memory_bytes for card in chosen if card] == [whole[0] // 2, whole[1], whole[0] // 2]


def test_all_workers_on_one_card_share_it() -> None:
    chosen = one("cuda:1", Place.parse("2/4"))
    assert chosen is not None
    assert chosen.memory_bytes == int(CARDS[1].memory_bytes * MODEL_SHARE) // 4


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "a/b", "-1/2", "1/2/3"])
def test_a_place_that_there_is_not_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="2/4"):
        Place.parse(text)


def test_auto_is_the_main_processor_where_there_is_no_card() -> None:
    usable = Mock()
    assert choose("torch", "auto", Place(), list, usable) is None
    usable.assert_not_called()


def test_auto_says_that_torch_cannot_use_the_card(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose("torch", "auto", Place(), two, no) is None
    assert "Big" in caplog.text


@pytest.mark.parametrize("device", ["abacus", "cuda:", "cuda:-1", "cuda:x", "CUDA", ""])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="known: auto, cpu, cuda, cuda:N"):
        one(device)


@pytest.mark.parametrize(("device", "cards"), [("cuda", list), ("cuda:2", two)])
def test_a_card_that_is_not_there_is_refused(device: str, cards: Mock) -> None:
    with pytest.raises(ConfigError, match="shows"):
        choose("torch", device, Place(), cards, yes)


def test_a_card_that_torch_cannot_use_is_refused() -> None:
    with pytest.raises(ConfigError, match="build for CUDA"):
        choose("torch", "cuda:1", Place(), two, no)


def test_echo_computes_on_no_card() -> None:
    assert choose("echo", "cuda", Place(), two, yes) is None


def test_a_build_for_the_main_processor_needs_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "2.13.0+cpu")
    monkeypatch.setattr(compute.subprocess, "run", Mock(side_effect=AssertionError))
    assert not compute.torch_uses_cuda()


@pytest.mark.parametrize("status", [0, 1])
def test_torch_is_asked_in_a_process_of_its_own(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "2.13.0")
    monkeypatch.setattr(compute.subprocess, "run", Mock(return_value=Mock(returncode=status)))
    assert compute.torch_uses_cuda() == (status == 0)


def test_without_torch_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", Mock(side_effect=metadata.PackageNotFoundError))
    assert not compute.torch_uses_cuda()


def test_a_torch_that_does_not_answer_counts_as_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "2.13.0")
    monkeypatch.setattr(compute.subprocess, "run", Mock(side_effect=compute.subprocess.TimeoutExpired("torch", 1)))
    assert not compute.torch_uses_cuda()
