"""Where the store lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmos.store import default_store_path


@pytest.mark.parametrize(
    ("environ", "path"),
    [
        ({"LLMOS_STORE": "/models", "XDG_CACHE_HOME": "/cache"}, Path("/models")),
        ({"LLMOS_STORE": "~/models"}, Path.home() / "models"),
        ({"LLMOS_STORE": "models"}, Path.cwd() / "models"),
        ({"XDG_CACHE_HOME": "/cache"}, Path("/cache/llmos/store")),
        ({"XDG_CACHE_HOME": "relative"}, Path.home() / ".cache/llmos/store"),
        ({"LLMOS_STORE": "", "XDG_CACHE_HOME": ""}, Path.home() / ".cache/llmos/store"),
        ({}, Path.home() / ".cache/llmos/store"),
    ],
)
def test_the_store_is_the_users_and_can_be_moved(environ: dict[str, str], path: Path) -> None:
    assert default_store_path(environ) == path
