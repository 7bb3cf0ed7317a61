"""Regenerate the stubs of `llmos/v1` and `llmos/internal/v1` from the contracts: `python protos/generate.py`.

The generator is grpcio-tools at the oldest version that llmos supports (the constraints file pins it), because stubs
run with their own protobuf and the next major one, never with an older one.
"""

from __future__ import annotations

import argparse
import sys
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent


def generate(out: Path) -> None:
    """Write `_pb2.py`, `_pb2_grpc.py` and their `.pyi` for every contract below `out`. Raises SystemExit on errors."""
    contracts = sorted(str(path.relative_to(HERE)) for path in HERE.glob("llmos/**/*.proto"))
    status = protoc.main(
        [
            "protoc",
            f"--proto_path={HERE}",
            f"--proto_path={resources.files('grpc_tools') / '_proto'}",
            f"--plugin=protoc-gen-mypy={BIN / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={BIN / 'protoc-gen-mypy_grpc'}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_out=quiet:{out}",
            f"--mypy_grpc_out=quiet:{out}",
            *contracts,
        ]
    )
    if status:
        raise SystemExit(status)


def main() -> None:
    """Parse the command line and generate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE.parent, help="folder to write below (default: this checkout)")
    generate(parser.parse_args().out)


if __name__ == "__main__":
    main()
