"""`vlv mcp` without what it needs; with it, see tests/serve/test_tools.py."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import Vlv


def test_the_package_is_optional(vlv: Vlv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    result = vlv("mcp")
    assert result.code == 1
    assert result.err == 'vlv: this needs the package mcp: pip install "vlv[mcp]"\n'


def test_a_root_that_is_no_folder(vlv: Vlv, tmp_path: Path) -> None:
    pytest.importorskip("mcp")
    result = vlv("mcp", "--root", tmp_path / "none")
    assert result.code == 1
    assert "none is no folder; name one that holds images" in result.err
