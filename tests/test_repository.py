"""The files around the code: what they name exists, and what they promise is done."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(file: Path) -> list[tuple[str, str]]:
    """Name and argument of every instruction of a Dockerfile, with continued lines joined."""
    text = re.sub(r"\\\n", " ", file.read_text())
    lines = [line.strip() for line in text.splitlines()]
    parsed = [line.partition(" ") for line in lines if line and not line.startswith("#")]
    return [(name, argument.strip()) for name, _, argument in parsed]


def test_dockerfile_is_well_formed() -> None:
    found = instructions(ROOT / "Dockerfile")
    names = [name for name, _ in found]
    known = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT", "CMD", "ENV"}
    assert set(names) <= known
    assert names.index("FROM") == names.index("ARG") + 1, "the base image is an argument"
    assert names.count("FROM") == names.count("ENTRYPOINT") == 1
    assert dict(found)["USER"] not in {"root", "0"}
    for name, argument in found:
        if name in {"ENTRYPOINT", "CMD"}:
            assert isinstance(yaml.safe_load(argument), list), f"{name} is in exec form"
        if name == "RUN":
            assert shlex.split(argument), "quotes are closed"


def test_dockerfile_copies_what_exists_and_is_sent() -> None:
    sent = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")
    }
    for name, argument in instructions(ROOT / "Dockerfile"):
        if name == "COPY":
            for source in argument.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert source in sent, f"{source} is not sent to the builder"


def test_dockerfile_installs_extras_that_exist_and_the_tested_torch() -> None:
    arguments = dict(
        argument.split("=", 1)
        for name, argument in instructions(ROOT / "Dockerfile")
        if name == "ARG"
    )
    extras = arguments["EXTRAS"].strip('"').split(",")
    assert set(extras) <= PROJECT["optional-dependencies"].keys()
    assert arguments["TORCH"].strip('"') in (ROOT / "constraints.txt").read_text().split()


def test_workflow_calls_the_script_of_ci() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    commands = [
        step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step
    ]
    assert commands == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_citation_agrees_with_the_project() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [
        author["name"] for author in PROJECT["authors"]
    ]


def test_links_between_the_pages_of_the_repository_lead_somewhere() -> None:
    for page in ROOT.glob("*.md"):
        for name in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name} links to {name}"
