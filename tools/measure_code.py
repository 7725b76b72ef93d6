"""Measure the code base: size, coupling, signatures, typing, comments and import time.

    python tools/measure_code.py                  # the working tree
    python tools/measure_code.py HEAD~50 .        # a revision beside the working tree
    python tools/measure_code.py --json

Only the standard library is needed; without PyTorch in the environment the import time is left out.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "vlv"
MANY_PARAMETERS = 10
_DIRECTIVE = re.compile(r"#\s*(noqa|type:|fmt:|pragma|ruff|mypy)|#!|#\s*-{3,}")


@dataclass
class Measures:
    """What one tree measures; `rows` gives it as text."""

    src_lines: int = 0
    src_files: int = 0
    test_lines: int = 0
    test_files: int = 0
    one_importer: list[str] = field(default_factory=list)
    """Modules that exactly one other module of the package imports."""
    many_parameters: list[tuple[int, str]] = field(default_factory=list)
    """Functions with ten parameters or more."""
    any_uses: int = 0
    casts: int = 0
    type_ignores: int = 0
    comment_lines: int = 0
    function_lines: list[tuple[int, str]] = field(default_factory=list)
    file_lines: list[tuple[int, str]] = field(default_factory=list)
    import_seconds: float | None = None
    import_noise: int | None = None
    """Lines that `import vlv` prints."""

    def rows(self) -> list[tuple[str, str]]:
        """Names and values of the table."""
        lengths = sorted(length for length, _ in self.function_lines)
        longest, longest_name = max(self.function_lines)
        file_length, file_name = max(self.file_lines)
        most = max(self.many_parameters, default=(0, ""))
        importing = "not measured"
        if self.import_seconds is not None:
            importing = f"{self.import_seconds:.2f} s, {self.import_noise} lines printed"
        per_1000 = 1000 / max(self.src_lines, 1)
        return [
            ("lines of src (files)", f"{self.src_lines:,} ({self.src_files})"),
            ("lines of tests (files)", f"{self.test_lines:,} ({self.test_files})"),
            ("modules with exactly one importer", f"{len(self.one_importer)} of {self.src_files}"),
            ("functions with 10 parameters or more (max)", f"{len(self.many_parameters)} ({most[0] or '-'})"),
            ("Any per 1,000 lines (uses)", f"{self.any_uses * per_1000:.1f} ({self.any_uses})"),
            ("casts", str(self.casts)),
            ("type ignores", str(self.type_ignores)),
            ("comment lines (share)", f"{self.comment_lines} ({0.1 * self.comment_lines * per_1000:.1f} %)"),
            ("functions: median, 90th percentile of lines", f"{statistics.median(lengths):g}, {lengths[int(0.9 * len(lengths))]}"),
            ("functions longer than 60 lines", str(sum(length > 60 for length in lengths))),
            ("longest function", f"{longest} ({longest_name})"),
            ("longest file", f"{file_length} ({file_name})"),
            (f"import {PACKAGE}", importing),
        ]  # fmt: skip


def measure(root: Path) -> Measures:
    """Measure the tree under a folder."""
    found = Measures()
    source = root / "src" / PACKAGE
    files = sorted(source.rglob("*.py"))
    trees = {_module_name(file, root / "src"): ast.parse(file.read_bytes()) for file in files}
    for file, (module, tree) in zip(files, trees.items(), strict=True):
        lines = _line_count(file)
        found.src_lines += lines
        found.file_lines.append((lines, module))
        _add_functions(found, module, tree)
        _add_tokens(found, file)
    found.src_files = len(files)
    tests = sorted((root / "tests").rglob("*.py"))
    found.test_files, found.test_lines = len(tests), sum(map(_line_count, tests))
    importers = _importers(trees)
    found.one_importer = sorted(name for name, by in importers.items() if len(by) == 1)
    found.import_seconds, found.import_noise = _import_time(root / "src")
    return found


def _line_count(file: Path) -> int:
    return len(file.read_bytes().splitlines())


def _module_name(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _add_functions(found: Measures, module: str, tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{module}.{node.name}"
            found.function_lines.append(((node.end_lineno or node.lineno) - node.lineno + 1, name))
            given = node.args
            names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            count += (given.vararg is not None) + (given.kwarg is not None)
            if count >= MANY_PARAMETERS:
                found.many_parameters.append((count, name))
        elif isinstance(node, ast.Call):
            found.casts += isinstance(node.func, ast.Name) and node.func.id == "cast"
        elif isinstance(node, ast.Name):
            found.any_uses += node.id == "Any"


def _add_tokens(found: Measures, file: Path) -> None:
    with tokenize.open(file) as stream:
        for token in tokenize.generate_tokens(stream.readline):
            if token.type == tokenize.COMMENT:
                found.type_ignores += "type: ignore" in token.string
                own_line = token.line.lstrip().startswith("#")
                found.comment_lines += own_line and not _DIRECTIVE.match(token.string)


def _importers(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Who imports each module of the package, at the top of a file or within a function."""
    importers: dict[str, set[str]] = {name: set() for name in trees}
    for module, tree in trees.items():
        for target in _imported(tree):
            if target in importers and target != module:
                importers[target].add(module)
    return importers


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _import_time(path: Path) -> tuple[float | None, int | None]:
    """The fastest of three imports in fresh processes, and the number of lines it prints."""
    code = f"import time; a = time.perf_counter(); import {PACKAGE}; print('took', time.perf_counter() - a)"
    environment = os.environ | {"PYTHONPATH": str(path), "HF_HUB_OFFLINE": "1"}
    times, noise = [], 0
    for _ in range(3):
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )  # fmt: skip
        if run.returncode:
            return None, None
        lines = (run.stdout + run.stderr).splitlines()
        times += [float(line.split()[1]) for line in lines if line.startswith("took ")]
        noise = len(lines) - 1
    return min(times), noise


def measure_revision(revision: str) -> Measures:
    """Measure a revision of git, or the working tree for "."."""
    top = subprocess.run(
        ["git", "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=True
    )
    root = Path(top.stdout.strip())
    if revision == ".":
        return measure(root)
    archive = subprocess.run(
        ["git", "-C", str(root), "archive", revision, "src", "tests"], capture_output=True, check=True
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(folder, filter="data")
        return measure(Path(folder))


def table(columns: dict[str, Measures]) -> str:
    """The measures as a Markdown table, a column for each tree."""
    rows = [measures.rows() for measures in columns.values()]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {cells[0][0]} | {' | '.join(value for _, value in cells)} |"
        for cells in zip(*rows, strict=True)
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("revisions", nargs="*", default=["."], help='git revisions; "." is the working tree')  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.add_argument("--names", action="store_true", help="also list the modules and functions counted")  # fmt: skip
    options = parser.parse_args(arguments)
    columns = {revision: measure_revision(revision) for revision in options.revisions}
    if options.json:
        print(json.dumps({name: dict(found.rows()) for name, found in columns.items()}, indent=1))
        return 0
    print(table(columns))
    if options.names:
        for name, found in columns.items():
            print(f"\n{name}: one importer: {', '.join(found.one_importer)}")
            many = sorted(found.many_parameters, reverse=True)
            print(f"{name}: many parameters: {', '.join(f'{f} ({n})' for n, f in many)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
