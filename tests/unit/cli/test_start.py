from __future__ import annotations

import subprocess
import sys

SLOW = ("grpc", "google.protobuf", "opentelemetry", "cryptography", "torch", "rich", "msgspec", "starlette")


def test_the_command_line_is_read_before_anything_slow_is_loaded() -> None:
    script = f"import sys, llmos.cli.main; print([name for name in {SLOW!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
