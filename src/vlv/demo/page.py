"""The page of `vlv demo`: images, their reconstructions and captions, and the measured figures of the model."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, NamedTuple

from vlv.errors import ModelFolderError, OutputError
from vlv.evaluation.results import figure_row
from vlv.jobs.verify import verdict_columns
from vlv.jobs.verify_page import doubtful_stretches, proposals
from vlv.pages import image_uri, render
from vlv.storage import Json, write_text
from vlv.toyworld.claims import mark_claims
from vlv.toyworld.language import compare, parse

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from PIL import Image

    from vlv.demo.cases import Case, Demo, Sampling
    from vlv.toyworld.scene import Scene

EVALUATION_NAME = "evaluation.json"
"""What `vlv eval toyworld --json` wrote, kept in the model folder."""

_SMALL_PX = 128


class _Image(NamedTuple):
    uri: str
    small: bool
    """Shown with visible pixels."""


class _Section(NamedTuple):
    title: str
    reason: str
    """Why it was not measured, or nothing."""
    rows: list[tuple[str, ...]]


def make_page(
    demo: Demo, model: str, sampling: Sampling, *, notes: Sequence[str], folder: Path
) -> str:
    """Write the page.

    Args:
        demo: What is shown.
        model: Name of the model.
        sampling: How the images were generated.
        notes: Sentences to the reader, on top.
        folder: Folder of the model, where its figures are looked for.

    Returns:
        A complete HTML document.

    Raises:
        ModelFolderError: The file of figures is damaged.
    """
    return render(
        "demo.html.jinja",
        title=f"vlv demo: {model}",
        notes=notes,
        shape=demo.shape,
        known=any(case.subject.scene for case in demo.cases),
        doubts=any(case.verdict for case in demo.cases),
        cases=[_case(case) for case in demo.cases],
        mixes=list(_mixes(demo)),
        figures=_figures(folder / EVALUATION_NAME),
        sampling=sampling,
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


def _image(image: Image.Image) -> _Image:
    return _Image(image_uri(image), max(image.size) <= _SMALL_PX)


def _case(case: Case) -> dict[str, object]:
    text, scene = case.caption.text, case.subject.scene
    remarks = [] if scene is None else [_count(text, scene)]
    if not case.caption.finished:
        remarks.append("the caption was stopped at its longest length")
    if case.cut:
        remarks.append("the decoder reads only its beginning")
    doubtful = []
    if case.verdict is not None:
        row = verdict_columns(case.verdict) | {"caption": text}
        doubtful = doubtful_stretches(row, case.verdict.threshold)
        remarks += proposals(row, case.verdict.threshold)
    return {
        "name": case.subject.name,
        "image": _image(case.subject.image),
        "reconstruction": _image(case.reconstruction),
        "regenerated": _image(case.regenerated),
        "words": list(_words(text, scene, doubtful)),
        "remarks": remarks,
    }


def _count(text: str, scene: Scene) -> str:
    counts = compare(parse(text), scene)
    wrong = counts.stated - counts.correct
    return f"{counts.correct} of {counts.true} facts said, {wrong} wrong"


def _words(
    text: str, scene: Scene | None, doubtful: Sequence[tuple[int, int]]
) -> Iterator[tuple[str, str]]:
    """Pieces of a caption with their marks: claims about a known scene are right or wrong, words may be doubtful."""
    marks = [] if scene is None else mark_claims(text, scene)
    kinds = [(x.start, x.end, "right" if x.right else "wrong") for x in marks]
    kinds += [(start, end, "doubtful") for start, end in doubtful]
    edges = sorted({0, len(text), *(edge for start, end, _ in kinds for edge in (start, end))})
    for first, last in itertools.pairwise(edges):
        names = [kind for start, end, kind in kinds if start <= first and last <= end]
        yield " ".join(names), text[first:last]


def _mixes(demo: Demo) -> Iterator[dict[str, object]]:
    """The mixes between the reconstructions from either of the two embeddings alone."""
    if not demo.mixes:
        return
    *splits, average = [(mix.image, mix.label, mix.caption) for mix in demo.mixes]
    first, second = (
        (case.reconstruction, f"{number} alone", case.caption.text)
        for number, case in zip(("first", "second"), demo.cases, strict=False)
    )
    for image, label, caption in (first, *splits, second, average):
        yield {"image": _image(image), "label": label, "caption": caption}


def _figures(path: Path) -> list[_Section] | None:
    """The measured figures of the model; None where there are none."""
    if not path.is_file():
        return None
    try:
        sections = json.loads(path.read_text(encoding="utf-8"))["sections"]
        return [_section(section) for section in sections.values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFolderError(
            f"{path} holds no evaluation ({error}); write it with vlv eval toyworld --json"
        ) from error


def _section(section: Json) -> _Section:
    if "not_measured" in section:
        return _Section(section["title"], section["not_measured"], [])
    return _Section(section["title"], "", [figure_row(f) for f in section["figures"].values()])
