"""Peers that are not built, and llama.cpp's layout of our weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench import engine
from bench.peers import gguf_file, places
from bench.peers.places import SMOLLM2, MissingPeer


@pytest.mark.parametrize("peer", ["llama_cpp", "vllm"])
def test_a_missing_environment_is_named_with_what_to_do(tmp_path: Path, peer: str) -> None:
    with pytest.raises(MissingPeer, match=f"{peer} is not here: run `make peers` first"):
        places.python(peer, tmp_path)


def test_an_environment_half_built_is_missing(tmp_path: Path) -> None:
    python = tmp_path / "vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()

    with pytest.raises(MissingPeer):
        places.python("vllm", tmp_path)
    (tmp_path / "vllm" / ".made").touch()
    assert places.python("vllm", tmp_path) == python


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingPeer, match=r"llama\.cpp's Q8_0 file of SmolLM2-135M"):
        SMOLLM2.gguf("q8_0", tmp_path)


def test_a_benchmark_without_its_peer_fails_before_it_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(places, "PEERS", tmp_path)
    monkeypatch.setattr("sys.argv", ["bench.engine", "--quick", "--json"])

    assert engine.main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "llama_cpp is not here: run `make peers` first" in err


def test_rotary_pairs_become_neighbours() -> None:
    two_heads_of_four = np.array([[0], [1], [10], [11], [20], [21], [30], [31]], np.float32)

    assert gguf_file.neighbours(two_heads_of_four, 2).ravel().tolist() == [0, 10, 1, 11, 20, 30, 21, 31]
