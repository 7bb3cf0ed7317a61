"""How a service says that it serves: a file that whoever started it waits for."""

from __future__ import annotations

import json
import os
from pathlib import Path


def write_ready(file: Path | None, node_id: str, **ports: int) -> None:
    """Write `{"id", "pid", ...ports}` to `file`, at once as a whole; None writes nothing."""
    if file is None:
        return
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_text(json.dumps({"id": node_id, "pid": os.getpid(), **ports}), encoding="utf-8")
    draft.replace(file)
