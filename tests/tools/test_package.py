"""What is in the wheel: the package with its data, and none of the tools, tests and benchmarks."""

from __future__ import annotations

import tomllib
from pathlib import Path

from setuptools import find_packages

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_only_the_package_is_in_the_wheel() -> None:
    (where,) = PROJECT["tool"]["setuptools"]["packages"]["find"]["where"]
    found = find_packages(str(ROOT / where))
    assert {name.split(".")[0] for name in found} == {"vlv"}
    assert not any("tour" in name or "test" in name or "benchmark" in name for name in found)
    assert {"vlv.pages", "vlv.training", "vlv.cli"} <= set(found)


def test_templates_and_other_data_are_in_the_wheel() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["vlv"]
    package = ROOT / "src" / "vlv"
    packed = {path for pattern in patterns for path in package.glob(pattern)}
    data = {
        path for path in package.rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"}
    }
    assert data - packed == set()
    assert package / "pages" / "base.html.jinja" in packed
