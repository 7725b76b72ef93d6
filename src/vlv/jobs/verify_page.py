"""The page of `vlv verify --page`: captions with their doubtful words underlined, beside image and reconstruction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vlv.data.framing import frame
from vlv.models.calibration import Calibration
from vlv.pages import image_uri, render

if TYPE_CHECKING:
    from PIL import Image

    from vlv.data.records import Record
    from vlv.jobs.formats import Row
    from vlv.models.pipeline import VLVPipeline

MOST_SHOWN = 50
_SMALL_PX = 128


def make_page(
    pipe: VLVPipeline,
    pairs: Sequence[tuple[Record, Row]],
    calibration: Calibration,
    *,
    title: str,
    notes: Sequence[str] = (),
) -> str:
    """Write the page of the most doubtful captions.

    Args:
        pipe: A model that reconstructs.
        pairs: Images and their finished rows.
        calibration: Whose threshold says what is doubtful.
        title: Of the page.
        notes: Sentences to the reader, on top.

    Returns:
        A complete HTML document.
    """
    shown = sorted(pairs, key=lambda pair: -pair[1]["doubt"])[:MOST_SHOWN]
    images = [frame(record.load(), pipe.image_size, pipe.framing) for record, _ in shown]
    drawn = pipe.reconstruct(images) if images else []
    if len(shown) < len(pairs):
        notes = [*notes, f"The {len(shown)} most doubtful of {len(pairs)} captions."]
    cases = [
        _case(row, image, reconstruction, calibration.threshold)
        for (_, row), image, reconstruction in zip(shown, images, drawn, strict=True)
    ]
    return render("doubts.html.jinja", title=title, notes=notes, cases=cases)


def _case(row: Row, image: Image.Image, reconstruction: Image.Image, threshold: float) -> Row:
    fixed = row.get("fixed")
    return {
        "name": row["id"],
        "image": _image(image),
        "reconstruction": _image(reconstruction),
        "words": list(split_words(row["caption"], doubtful_stretches(row, threshold))),
        "remarks": proposals(row, threshold),
        "fixed": fixed if fixed != row["caption"] else None,
        "score": row["score"],
        "doubt": row["doubt"],
    }


def _image(image: Image.Image) -> Row:
    return {"uri": image_uri(image), "small": max(image.size) <= _SMALL_PX}


def proposals(row: Row, threshold: float) -> list[str]:
    """What the decoder would rather read in place of doubtful claims."""
    return [
        f"“{claim['text']}” or rather “{claim['instead']}”: {100 * claim['doubt']:.0f} %"
        for claim in row["claims"]
        if claim["doubt"] >= threshold and claim["instead"]
    ]


def doubtful_stretches(row: Row, threshold: float) -> list[tuple[int, int]]:
    """What to underline: in each doubtful sentence its doubtful claims or, where it has none, all of it."""
    found = []
    for sentence in row["sentences"]:
        if sentence["doubt"] < threshold:
            continue
        start, end = sentence["start"], sentence["end"]
        claims = [x for x in row["claims"] if start <= x["start"] < end and x["doubt"] >= threshold]
        found += [(x["start"], x["end"]) for x in claims] or [(start, end)]
    return found


def split_words(text: str, stretches: Sequence[tuple[int, int]]) -> Iterator[tuple[bool, str]]:
    """A text in pieces, each with whether it is to be underlined."""
    end = 0
    for start, stop in stretches:
        if start > end:
            yield False, text[end:start]
        yield True, text[start:stop]
        end = stop
    if text[end:]:
        yield False, text[end:]
