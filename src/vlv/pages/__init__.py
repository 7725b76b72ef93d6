"""Pages that need nothing else: HTML of one base template, images and charts inline; Markdown; sheets of images."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Literal

import jinja2
from PIL import Image


def render(template: str, **values: object) -> str:
    """Fill in a template of this package, such as ``demo.html.jinja``; values are escaped in HTML."""
    return _environment().get_template(template).render(values)


def image_uri(image: Image.Image, kind: Literal["PNG", "JPEG"] = "PNG") -> str:
    """Encode an image as a data URI."""
    buffer = io.BytesIO()
    if kind == "JPEG":
        image.convert("RGB").save(buffer, kind, quality=88)
    else:
        image.save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def sheet(images: Sequence[Image.Image], columns: int, *, gap: int = 4) -> Image.Image:
    """Lay images of one size out on a white page, row by row.

    Args:
        images: At least one.
        columns: Images in a row.
        gap: Pixels between the images and around the page.
    """
    columns = min(columns, len(images))
    width, height = images[0].width + gap, images[0].height + gap
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        page.paste(image, (column * width + gap, row * height + gap))
    return page


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vlv", "pages"),
        autoescape=jinja2.select_autoescape(["html.jinja"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["style"] = (resources.files(__name__) / "style.css").read_text("utf-8")
    return environment
