"""The demo as one HTML page that needs nothing else: pictures inside, no scripts, no network."""

from __future__ import annotations

import base64
import html
import io
import json
from importlib import resources
from string import Template
from typing import TYPE_CHECKING, Any

from vlv.demo.claims import mark_claims
from vlv.errors import ModelFolderError, OutputError
from vlv.evaluation.results import format_value
from vlv.storage import write_text
from vlv.toyworld.language import compare, parse

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from PIL import Image

    from vlv.demo.cases import Case, Demo, Sampling
    from vlv.toyworld.scene import Scene

EVALUATION_NAME = "evaluation.json"
"""What `vlv eval toyworld --json` wrote, kept in the model folder."""

_SMALL_PX = 128
_LEGEND = (
    '<p>The scenes are known, so every claim can be checked: <span class="right">right</span>, '
    '<span class="wrong">not so</span>.</p>'
)
_NO_FIGURES = (
    f"<p>The model folder holds no measured figures ({EVALUATION_NAME}). "
    "<code>vlv eval toyworld --json FILE</code> measures them.</p>"
)


def make_page(
    demo: Demo, model: str, sampling: Sampling, *, notes: Sequence[str], folder: Path
) -> str:
    """Write the page.

    Args:
        demo: What is shown.
        model: Name of the model.
        sampling: How the images were drawn.
        notes: Sentences to the reader, on top.
        folder: Of the model, where its figures are looked for.

    Returns:
        A complete HTML document.

    Raises:
        ModelFolderError: The file of figures is damaged.
    """
    template = resources.files("vlv.demo") / "page.html"
    known = any(case.picture.scene for case in demo.cases)
    return Template(template.read_text("utf-8")).substitute(
        title=html.escape(f"vlv demo: {model}"),
        notes="\n".join(f'<p class="note">{html.escape(note)}</p>' for note in notes),
        num_queries=demo.shape[0],
        width=demo.shape[1],
        legend=_LEGEND if known else "",
        cases="\n".join(_case(case) for case in demo.cases),
        mixes=_mixes(demo),
        figures=_figures(folder / EVALUATION_NAME),
        settings=f"Images drawn in {sampling.steps} steps, guidance {sampling.guidance:g}, "
        f"seed {sampling.seed}.",
    )


def save_page(path: Path, page: str) -> None:
    """Write the page, whole or not at all.

    Raises:
        OutputError: The file cannot be written.
    """
    try:
        write_text(path, page)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def _figure(image: Image.Image, text: str) -> str:
    """A picture as a PNG data URI with its line of text."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    kind = ' class="small"' if max(image.size) <= _SMALL_PX else ""
    words = html.escape(text)
    return (
        f'<figure><img{kind} alt="{words}" src="data:image/png;base64,{data}">'
        f"<figcaption>{words}</figcaption></figure>"
    )


def _case(case: Case) -> str:
    cells = [
        _figure(case.picture.image, "image"),
        _figure(case.rebuilt, "rebuilt from z"),
        f'<div class="words"><p class="name">{html.escape(case.picture.name)}</p>{_caption(case)}</div>',
        _figure(case.redrawn, "drawn from the caption"),
    ]
    return f'<section class="case">{"".join(cells)}</section>'


def _caption(case: Case) -> str:
    """The caption, its claims coloured where the truth is known, and what there is to say about it."""
    text, scene = case.caption.text, case.picture.scene
    remarks = [] if scene is None else [_count(text, scene)]
    if not case.caption.finished:
        remarks.append("the caption was stopped at its longest length")
    if case.cut:
        remarks.append("the decoder reads only its beginning")
    words = html.escape(text) if scene is None else _coloured(text, scene)
    return f'<p>{words or "(no words)"}</p><p class="soft">{"; ".join(remarks)}</p>'


def _count(text: str, scene: Scene) -> str:
    counts = compare(parse(text), scene)
    wrong = counts.stated - counts.correct
    return f"{counts.correct} of {counts.true} facts said, {wrong} wrong"


def _coloured(text: str, scene: Scene) -> str:
    pieces, end = [], 0
    for mark in mark_claims(text, scene):
        kind = "right" if mark.right else "wrong"
        words = html.escape(text[mark.start : mark.end])
        pieces += [html.escape(text[end : mark.start]), f'<span class="{kind}">{words}</span>']
        end = mark.end
    return "".join([*pieces, html.escape(text[end:])])


def _mixes(demo: Demo) -> str:
    """The mixes between what is rebuilt from either of the two embeddings alone."""
    if not demo.mixes:
        return ""
    *splits, average = [_mix(mix.image, mix.label, mix.caption) for mix in demo.mixes]
    first, second = [
        _mix(case.rebuilt, f"{number} alone", case.caption.text)
        for number, case in zip(("first", "second"), demo.cases, strict=False)
    ]
    cells = "".join([first, *splits, second, average])
    return (
        "<h2>Two embeddings in one</h2><p>The leading tokens of the first image's embedding, then "
        "those of the second's, as many of each as stated; and the average of both. Drawn and described "
        f'as any other embedding.</p><div class="mixes">{cells}</div>'
    )


def _mix(image: Image.Image, label: str, caption: str) -> str:
    return f"<div>{_figure(image, label)}<p>{html.escape(caption)}</p></div>"


# --- figures ---------------------------------------------------------------------------------------


def _figures(path: Path) -> str:
    """The measured figures of the model as a table, or the plain statement that there are none."""
    if not path.is_file():
        return _NO_FIGURES
    try:
        sections = json.loads(path.read_text(encoding="utf-8"))["sections"]
        rows = [row for section in sections.values() for row in _section(section)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFolderError(
            f"{path} holds no evaluation ({error}); write it with vlv eval toyworld --json"
        ) from error
    head = "<tr><th></th><th>value</th><th>95 % interval</th><th>n</th></tr>"
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _section(section: dict[str, Any]) -> list[str]:
    title = f'<tr><th colspan="4">{html.escape(section["title"])}</th></tr>'
    if "not_measured" in section:
        reason = html.escape(section["not_measured"])
        return [title, f'<tr><td colspan="4">not measured: {reason}</td></tr>']
    return [title, *(_row(figure) for figure in section["figures"].values())]


def _row(figure: dict[str, Any]) -> str:
    value, low, high = (
        "-" if figure[key] is None else format_value(figure[key], figure["unit"])
        for key in ("value", "low", "high")
    )
    interval = "" if figure["low"] is None else f"{low} to {high}"
    cells = (figure["label"], value, interval, str(figure["n"]))
    return f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
