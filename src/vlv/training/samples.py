"""Pictures and captions of the same few held-out images, at every look and after every resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from vlv.data.images import to_pil

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vlv.data.records import Record
    from vlv.models.pipeline import VLVPipeline
    from vlv.training.objective import Batch

NUM_IMAGES = 8
CHOSEN = "images.json"
"""In the samples folder: ids of the images that a run watches."""
_CELL_PX, _GAP, _LEFT, _LINE = 128, 6, 74, 16
_INK, _PAPER = (70, 70, 76), (255, 255, 255)


class Samples:
    """Draws what is rebuilt from z below each image, and writes captions as text; called with a step and a folder.

    The ids of the images are kept in the folder, so that a run that goes on shows the same ones, whatever was added to
    the held-out data since.

    Args:
        pipe: The parts in training.
        records: Held-out records; the first `NUM_IMAGES` are watched.
        load: Reads records into one batch with `ids` and `pixels`.
    """

    def __init__(
        self,
        pipe: VLVPipeline,
        records: Sequence[Record],
        load: Callable[[Sequence[Record]], Batch],
    ) -> None:
        self.pipe, self.records, self._load = pipe, records, load
        self._batch: Batch | None = None

    def __call__(self, step: int, folder: Path) -> None:
        """Write `<step>.png` where the parts can draw, and `<step>.txt` where they can caption."""
        if self._batch is None:
            self._batch = self._load(choose(self.records, folder / CHOSEN))
        ids, images = self._batch["ids"], list(self._batch["pixels"])
        z = self.pipe.embed(images)
        if self.pipe.decoder.denoiser is not None:
            rows = {
                "held out": [to_pil(image) for image in images],
                "from z": self.pipe.draw(self.pipe.context(z)),
            }
            save_sheet(folder / f"{step:07d}.png", rows, ids, f"step {step}")
        if self.pipe.caption_decoder is not None:
            texts = zip(ids, self.pipe.caption(z=z), strict=True)
            lines = [f"{name}: {text}\n" for name, text in texts]
            (folder / f"{step:07d}.txt").write_text("".join(lines), encoding="utf-8")


def choose(records: Sequence[Record], file: Path) -> list[Record]:
    """The records whose ids are in a file, or the first few, whose ids are then written to it."""
    by_id = {record.id: record for record in records}
    if file.exists():
        known = [by_id[name] for name in json.loads(file.read_text("utf-8")) if name in by_id]
        if known:
            return known
    chosen = list(records[:NUM_IMAGES])
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps([record.id for record in chosen], indent=1), "utf-8")
    temporary.replace(file)
    return chosen


def save_sheet(
    file: Path, rows: dict[str, list[Image.Image]], columns: Sequence[str], corner: str
) -> None:
    """Save rows of pictures with the names of rows and columns; `read_rows` takes them apart again."""
    side = max(image.width for image in next(iter(rows.values())))
    cell = side * max(1, -(-_CELL_PX // side))  # small pictures are enlarged by a whole number
    width = _LEFT + len(columns) * (cell + _GAP)
    page = Image.new("RGB", (width, _LINE + 4 + len(rows) * (cell + _GAP)), _PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default()
    draw.text((2, 4), corner, _INK, font)
    for x, name in enumerate(columns):
        draw.text((_LEFT + x * (cell + _GAP), 4), _fitting(draw, name, cell), _INK, font)
    for y, (label, images) in enumerate(rows.items()):
        top = _LINE + 4 + y * (cell + _GAP)
        draw.text((2, top + cell // 2 - 6), label, _INK, font)
        for x, image in enumerate(images):
            enlarged = image.resize((cell, cell), Image.Resampling.NEAREST)
            page.paste(enlarged if cell != image.width else image, (_LEFT + x * (cell + _GAP), top))
    about = PngImagePlugin.PngInfo()
    about.add_text(
        "layout", json.dumps({"cell": cell, "rows": list(rows), "columns": list(columns)})
    )
    page.save(file, pnginfo=about)


def read_rows(file: Path) -> dict[str, list[Image.Image]]:
    """The pictures of a sheet by row; empty for a picture that is no sheet of ours."""
    with Image.open(file) as page:
        layout = getattr(page, "text", {}).get("layout")
        if layout is None:
            return {}
        known = json.loads(layout)
        step = known["cell"] + _GAP
        rows: dict[str, list[Image.Image]] = {}
        for y, name in enumerate(known["rows"]):
            top = _LINE + 4 + y * step
            corners = [(_LEFT + x * step, top) for x in range(len(known["columns"]))]
            rows[name] = [
                page.crop((left, top, left + known["cell"], top + known["cell"]))
                for left, top in corners
            ]
        return rows


def _fitting(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """As much of the end of a name as fits: what tells two files apart is mostly there."""
    name = Path(text).name
    while len(name) > 1 and draw.textlength(name) > width:
        name = name[1:]
    return name
