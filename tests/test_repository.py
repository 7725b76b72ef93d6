"""The files around the code: what they name exists, and what they promise is done."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig
from typer.main import get_command

from vlv import VLVPipeline
from vlv.cli import app
from vlv.toyworld.render import render
from vlv.toyworld.scene import sample_scene
from vlv.toyworld.styles import STYLES, is_written_as

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


COMPOSE = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]


@pytest.mark.parametrize("name", COMPOSE)
def test_services_have_no_more_rights_than_they_need(name: str) -> None:
    service = COMPOSE[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert set(service.get("depends_on", {})) <= COMPOSE.keys()
    kind, program, flag, code = service["healthcheck"]["test"]
    assert (kind, flag) == ("CMD", "-c")
    assert program in ("python", "python3")
    compile(code, name, "exec")
    if "build" in service:
        build = service["build"]
        assert (ROOT / "deploy" / build["context"] / "Dockerfile").exists()
        extras = build["args"]["EXTRAS"].split(",")
        assert set(extras) <= PROJECT["optional-dependencies"].keys()


def parse(command: list[str]) -> None:
    """Refuse what the command line would refuse, and run nothing."""
    group = get_command(app)
    with group.make_context("vlv", list(command)) as context:
        found = group.get_command(context, command[0])  # type: ignore[attr-defined]
        found.make_context(command[0], command[1:], parent=context)


@pytest.mark.parametrize("name", [name for name, x in COMPOSE.items() if "build" in x])
def test_commands_of_services_are_ours(name: str) -> None:
    command = [re.sub(r"\$\{\w+:?-([^}]*)\}", r"\1", word) for word in COMPOSE[name]["command"]]
    parse(command)
    with pytest.raises(Exception, match="No such option"):
        parse([*command, "--no-such-option"])


def test_the_unit_runs_our_command(tmp_path: Path) -> None:
    text = (ROOT / "deploy" / "vlv-serve.service").read_text()
    (line,) = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    program, *command = shlex.split(line)
    assert Path(program).name == "vlv"
    parse(command)
    if verify := shutil.which("systemd-analyze"):
        unit = tmp_path / "vlv-serve.service"
        unit.write_text(text.replace(program, sys.executable))
        found = subprocess.run(
            [verify, "verify", unit], capture_output=True, text=True, check=False
        )
        assert "vlv-serve.service" not in found.stderr, found.stderr


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


def test_committed_weights_are_small() -> None:
    folders = (ROOT / "weights", ROOT / "src" / "vlv" / "weights")
    files = [file for folder in folders for file in folder.rglob("*.safetensors")]
    assert len(files) > 8
    assert sum(file.stat().st_size for file in files) < 60e6


def test_the_model_that_takes_instructions_follows_them_and_its_card_has_its_figures() -> None:
    folder = ROOT / "src" / "vlv" / "weights" / "tiny-instruct"
    results = json.loads((ROOT / "docs" / "results" / "instruct.json").read_text())
    figures = results["sections"]["instruct"]["figures"]
    for key in ("instruct.answers", "instruct.plain.f1"):
        shown = f"{100 * figures[key]['value']:.1f} %"
        for page in (folder / "README.md", ROOT / "docs" / "instructions.md"):
            assert shown in page.read_text(), f"{page} has other figures than docs/results"
    pipe = VLVPipeline.from_pretrained("vlv-tiny-instruct", parts=["caption"])
    image = render(sample_scene(7, 0, "test")).image
    for style in STYLES:
        assert is_written_as(style, pipe.caption(image, style=style))
    assert pipe.ask(image, "what kind of picture is it?").text == sample_scene(7, 0, "test").style
    base = VLVPipeline.from_pretrained("vlv-tiny", parts=["embed"])
    assert torch.equal(pipe.embed(image), base.embed(image)), "z is that of vlv-tiny"


def test_the_model_from_images_alone_captions_and_can_be_trained_further() -> None:
    folder = ROOT / "weights" / "tiny-stage2"
    figures = json.loads((folder / "evaluation.json").read_text())["sections"]["captions"]
    assert (
        f"F1 {100 * figures['figures']['captions.f1']['value']:.1f} %"
        in (folder / "README.md").read_text()
    ), "the card has other figures than its evaluation"
    pipe = VLVPipeline.from_pretrained(folder, parts=["caption"])
    caption = pipe.caption(render(sample_scene(7, 0, "test")).image)
    assert "small" in caption
    assert "purple" in caption
    for name in ("florence", "llm"):
        assert AutoConfig.from_pretrained(folder / "parts" / name).model_type
