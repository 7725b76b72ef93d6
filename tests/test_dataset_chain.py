"""runs/dataset.sh: from pictures to a caption decoder that has learnt from a teacher's captions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import write_image

SCRIPT = Path(__file__).parents[1] / "runs" / "dataset.sh"


@pytest.mark.slow
def test_filter_caption_stats_check_train(tmp_path: Path) -> None:
    small = write_image(tmp_path / "more" / "small.png", size=(20, 20))  # which the filter drops
    command = tmp_path / "bin" / "vlv"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m vlv "$@"\n')
    command.chmod(0o755)
    out = tmp_path / "out"
    environment = {
        **os.environ,
        "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
        "OUT": str(out),
        "NUM": "16",
        "STEPS": "3",
        "IMAGES": str(small.parent),
    }
    done = subprocess.run(
        ["bash", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (out / "captioned" / "captions.jsonl").open()]
    assert len(rows) == 16
    assert all(row["caption"] and row["error"] is None for row in rows)
    assert (out / "stats.html").exists()
    assert (out / "run" / "model" / "caption_decoder" / "model.safetensors").exists()
