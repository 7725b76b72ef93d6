"""The README's commands run, its code runs, and what it names exists."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from itertools import islice
from pathlib import Path

import pytest

from vlv.cli import run
from vlv.config import load_config
from vlv.jobs.plans import plan_uses

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Commands that are only parsed here, with the reason.
NOT_RUN = {
    "vlv toyworld render out/quick/train": "renders 512 scenes; the command runs twice with fewer",
    "vlv train paper-stage1": "needs downloads and days; tests/cli/test_train.py runs the command",
    "vlv train quick-stage1": "needs the shipped parts and a minute; tests/cli/test_train.py runs the presets",
    "vlv train quick-stage2": "the same",
    "vlv train quick-stage3": "the same",
    "vlv caption out/quick/held-out": "needs the model of the two commands before",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def command_lines() -> list[list[str]]:
    lines = "".join(blocks("bash")).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.fixture
def workplace(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and a small random model under the name of the shipped one."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path.parent / f"{tmp_path.name}-model"
    shutil.copytree(tiny_folder, model)
    _inspector().save_pretrained(model / "inspector")
    shutil.copy(ROOT / "src/vlv/weights/tiny/doubts.json", model)
    monkeypatch.setattr("vlv.models.folder.shipped_models", lambda: {"vlv-tiny": model})
    # of the paper's models the first use alone: each takes 15 seconds, and tests/jobs/test_plans.py has all of small ones
    monkeypatch.setattr("vlv.jobs.plans.plan_uses", lambda *a, **k: islice(plan_uses(*a, **k), 1))
    return tmp_path


def _inspector():  # type: ignore[no-untyped-def]
    from vlv.toyworld.inspector import Inspector, InspectorConfig

    return Inspector(InspectorConfig())


@pytest.mark.slow
def test_commands_and_code_run(workplace: Path) -> None:
    ran = 0
    for words in command_lines():
        if any(" ".join(words).startswith(command) for command in NOT_RUN):
            continue
        if words[0] == "vlv":
            assert run(words[1:]) == 0, words
        else:
            subprocess.run(words, check=True)
        ran += 1
    assert ran >= 9
    for number, code in enumerate(blocks("python")):
        exec(compile(code, f"README python block {number}", "exec"), {})
    assert (workplace / "mixed.png").exists()


def test_trainings_that_are_not_run_are_right() -> None:
    trainings = [words for words in command_lines() if words[:2] == ["vlv", "train"]]
    assert {" ".join(words[:3]) for words in trainings} < NOT_RUN.keys()
    for words in trainings:
        options = [word for word in words[3:] if word != "--dry-run"]
        given = dict(zip(options[::2], options[1::2], strict=True))
        assert given.keys() <= {"--set", "--run-dir"}
        assert words[2].endswith(
            load_config(words[2], [given["--set"]] if "--set" in given else []).stage
        )


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"^make (\w+)", README, re.MULTILINE))
    assert named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_files_that_are_named_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    paths = re.findall(r"`((?:runs|tests|docs|benchmarks)/[\w./-]+)`", README)
    assert links
    for name in (*links, *paths):
        assert (ROOT / name).exists(), name


def test_length() -> None:
    assert README.count("\n") <= 200
