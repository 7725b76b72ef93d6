"""Places that workers share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs.shared import store

KINDS = ("folder", "store", "plain store", "memory")


def make_place(kind: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An output of a kind; all but memory are seen by every process."""
    path.mkdir()
    if kind == "folder":
        return str(path / "shared")
    if kind == "memory":
        return f"memory://{path}"
    store.register()
    monkeypatch.setenv(store.ROOT, str(path))
    return ("bucket" if kind == "store" else "plain") + "://tests/shared"


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return make_place(request.param, tmp_path / "place", monkeypatch)
