"""The shape of the code: imports point one way, names and sizes keep to what was agreed."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "vlv"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module may import from its own layer and from the layers before it.
LAYERS = [
    ("errors",),
    ("storage",),
    ("progress",),
    ("pages",),
    ("config_files",),
    ("config_sections",),
    ("config_stages",),
    ("config",),
    ("data",),
    ("endpoint",),
    ("models",),
    ("engine",),
    ("training",),
    ("jobs",),
    ("search",),
    ("curation",),
    ("toyworld",),
    ("evaluation",),
    ("demo",),
    ("serve",),
    ("ui",),
    ("cli",),
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    own = layer(path)
    if own in {"__init__", "__main__"}:
        return
    for name in imported_modules(parsed(path)):
        if not name.startswith("vlv.") or name == "vlv.__version__":
            continue
        other = name.split(".")[1]
        assert other in RANK, f"{path} imports {name}, which belongs to no layer"
        assert RANK[other] <= RANK[own], f"{path} ({own}) imports {name}: the arrow is reversed"


def test_every_folder_has_a_layer() -> None:
    assert {layer(path) for path in FILES} <= {*RANK, "__init__", "__main__"}


@pytest.mark.parametrize("folder", ["data", "models", "training"])
def test_no_special_names_in_the_general_code(folder: str) -> None:
    hits = [
        f"{path}:{number}: {line.strip()}"
        for path in (PACKAGE / folder).rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if re.search(r"tiny|toy", line, re.IGNORECASE)
    ]
    assert not hits


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_sizes(path: Path) -> None:
    assert path.read_text().count("\n") <= MAX_FILE_LINES
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


def test_one_training_loop() -> None:
    """The only loop over batches that trains is in training/loop.py."""
    hits = [
        str(path.relative_to(PACKAGE))
        for path in FILES
        if re.search(r"\.backward\(", path.read_text())
    ]
    assert all(hit.startswith("training/") for hit in hits), hits
