"""The measuring script: each figure of a small tree is counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.measure_code import main, measure, table

FILES = {
    "src/vlv/__init__.py": '"""Package."""\nprint("noise")\n',
    "src/vlv/a.py": '''"""A module."""

from typing import Any, cast

# says why
WIDTH = 3  # not on a line of its own
# noqa: E501


def wide(a, b, c, d, e, f, g, h, *, i, **k) -> Any:
    return cast(Any, a)  # type: ignore[no-any-return]


class Box:
    def narrow(self, a, b, c, d, e, f, g, h, i):
        return a
''',
    "src/vlv/b.py": "from vlv import a\nfrom vlv.a import WIDTH\n",
    "src/vlv/c.py": "import vlv.b\nimport vlv.a\n",
    "tests/test_a.py": "def test_a():\n    assert True\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_measures_of_a_small_tree(tree: Path) -> None:
    found = measure(tree)
    assert (found.src_files, found.test_files, found.test_lines) == (4, 1, 2)
    assert found.src_lines == sum(t.count("\n") for n, t in FILES.items() if n.startswith("src"))
    assert found.one_importer == ["vlv", "vlv.b"], "a has two importers, c none"
    assert found.many_parameters == [(10, "vlv.a.wide")], "self is no parameter"
    assert (found.any_uses, found.casts, found.type_ignores, found.comment_lines) == (2, 1, 1, 1)
    assert max(found.function_lines) == (2, "vlv.a.wide")
    assert found.import_seconds is not None
    assert found.import_noise == 1


def test_the_table_has_a_column_for_each_tree(tree: Path) -> None:
    found = measure(tree)
    lines = table({"before": found, "after": found}).splitlines()
    assert lines[0] == "| | before | after |"
    assert "| functions with 10 parameters or more (max) | 1 (10) | 1 (10) |" in lines


@pytest.mark.slow
def test_the_working_tree(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["."]
    assert int(rows["lines of src (files)"].split()[0].replace(",", "")) > 10_000
