"""`vlv ui`: what can be said without a browser."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from tests.cli.conftest import Vlv


def test_the_workbench_is_an_extra(vlv: Vlv, monkeypatch: pytest.MonkeyPatch) -> None:
    load = importlib.import_module

    def lacking(name: str, *more: Any) -> Any:
        if name == "gradio":
            raise ImportError(name)
        return load(name, *more)

    monkeypatch.setattr(importlib, "import_module", lacking)
    result = vlv("ui")
    assert (result.code, result.out) == (1, "")
    assert 'the workbench needs gradio: pip install "vlv[ui]"' in result.err
