"""Which processor `--device` means."""

from __future__ import annotations

import logging
from importlib import metadata
from unittest.mock import Mock

import pytest

from llmos.errors import ConfigError
from worker import compute
from worker.compute import choose
from worker.nvml import Gpu

CARDS = [Gpu("GPU-1", "Big", 80 << 30), Gpu("GPU-2", "Small", 24 << 30)]


def two() -> list[Gpu]:
    return CARDS


def yes() -> bool:
    return True


def no() -> bool:
    return False


@pytest.mark.parametrize(("device", "card"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1), ("cpu", None)])
def test_a_card_is_chosen_by_its_number(device: str, card: int | None) -> None:
    assert choose("torch", device, two, yes) == (None if card is None else CARDS[card])


def test_auto_is_the_main_processor_where_there_is_no_card() -> None:
    usable = Mock()
    assert choose("torch", "auto", list, usable) is None
    usable.assert_not_called()


def test_auto_says_that_torch_cannot_use_the_card(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose("torch", "auto", two, no) is None
    assert "Big" in caplog.text


@pytest.mark.parametrize("device", ["abacus", "cuda:", "cuda:-1", "cuda:x", "CUDA", ""])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="known: auto, cpu, cuda, cuda:N"):
        choose("torch", device, two, yes)


@pytest.mark.parametrize(("device", "cards"), [("cuda", list), ("cuda:2", two)])
def test_a_card_that_is_not_there_is_refused(device: str, cards: Mock) -> None:
    with pytest.raises(ConfigError, match="shows"):
        choose("torch", device, cards, yes)


def test_a_card_that_torch_cannot_use_is_refused() -> None:
    with pytest.raises(ConfigError, match="build for CUDA"):
        choose("torch", "cuda:1", two, no)


def test_echo_computes_on_no_card() -> None:
    assert choose("echo", "cuda", two, yes) is None


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
