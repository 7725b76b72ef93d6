"""Progress of work outside a command: lines where nobody watches."""

from __future__ import annotations

import pytest

from vlv.progress import Progress


def test_lines_tell_what_is_done_and_go_on_from_what_was(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("vlv.progress.time.monotonic", lambda: now)
    with Progress(100, done=40, what="run", unit="step") as progress:
        for second in range(1, 32):
            now = float(second)
            progress.postfix("loss 1.0")
            progress.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["run: 70/100 steps, 1/s, about 00:30 left, loss 1.0"]
