"""Hooks of the documentation site: pages that are made while it is built, and links to files beside docs/."""

from __future__ import annotations

import re
from pathlib import Path

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
BESIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Files of the repository and the page of the site that stands for each."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the command line's reference, the changelog and the guide for contributors."""
    pages = {"reference/cli.md": cli_page()}
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        pages[BESIDE[name]] = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to files beside docs/ lead to their pages."""
    return re.sub(
        r"\]\((?:\.\./)+(\w+\.md)(#[^)]*)?\)",
        lambda link: f"]({BESIDE.get(link[1], link[1])}{link[2] or ''})",
        markdown,
    )


def cli_page() -> str:
    """Every command with its arguments and options, from the code."""
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    from vlv.cli import app

    command = get_command(app)
    context = typer.Context(command, info_name="vlv")
    text = get_docs_for_click(obj=command, ctx=context, name="vlv", title="Command line")
    return re.sub(r"^(#+) `(.*)`$", r"\1 \2", text, flags=re.MULTILINE)
