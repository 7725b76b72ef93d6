"""HTML pages that need nothing else: one base template, one stylesheet, images and charts inline, no network."""

from __future__ import annotations

import base64
import io
from importlib import resources
from typing import TYPE_CHECKING, Literal

from vlv.errors import ConfigError

if TYPE_CHECKING:
    import jinja2
    from PIL import Image


def render(template: str, **values: object) -> str:
    """Fill in a template of this package, such as ``demo.html.jinja``; values are escaped.

    Raises:
        ConfigError: Jinja is not installed.
    """
    return _environment().get_template(template).render(values)


def image_uri(image: Image.Image, kind: Literal["PNG", "JPEG"] = "PNG") -> str:
    """Encode an image as a data URI."""
    buffer = io.BytesIO()
    if kind == "JPEG":
        image.convert("RGB").save(buffer, kind, quality=88)
    else:
        image.save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _environment() -> jinja2.Environment:
    try:
        import jinja2
    except ImportError:
        raise ConfigError("pages need Jinja: pip install jinja2") from None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vlv", "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["style"] = (resources.files(__name__) / "style.css").read_text("utf-8")
    return environment
