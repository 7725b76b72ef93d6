"""Charts: what is drawn is what was given, as one SVG element that fetches nothing."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from PIL import Image

from vlv.pages import charts, image_uri, render, sheet


def lines(svg: str) -> list[str]:
    """Paths of the series."""
    return re.findall(r'<path d="([^"]*)"[^>]*stroke-width: 1\.4', svg)


def test_a_line_chart() -> None:
    points = [(float(step), step * 7919 % 1000) for step in range(1, 1001)]
    svg = charts.line_chart({"a<b": points, "c": [(10, 0.5), (20, float("nan"))]})
    ET.fromstring(svg.replace("xlink:", ""))
    assert svg.startswith("<svg")
    assert "http" not in svg
    longest = max(lines(svg), key=len)
    assert 200 <= len(re.findall(r"[ML] ", longest)) <= 300, "thinned"
    assert "a&lt;b" in svg, "the legend"
    assert "c 0.5" in svg, "with the last value"
    assert charts.line_chart({"a": [], "b": [(1, float("nan"))]}) == ""


def test_values_as_percentages() -> None:
    svg = charts.line_chart({"a": [(0, 0.0), (9, 0.5)], "b": [(0, 0.25), (9, 0.3)]}, percent=True)
    assert "a 50.0%" in svg
    assert ">50%<" in svg


def test_the_same_chart_is_the_same_text() -> None:
    series = {"a": [(0.0, 1.0), (1.0, 2.0)]}
    assert charts.line_chart(series) == charts.line_chart(series)


def test_error_bars_leave_out_what_is_unknown() -> None:
    figure, (axes,) = charts.new_chart()
    known = {"value": 2.0, "low": 1.0, "high": 4.0}
    charts.error_bars(axes, [0, 1], [known, {"value": 1.0, "low": None, "high": None}])
    (bars,) = axes.collections
    ends = [[point[1] for point in segment] for segment in bars.get_segments()]
    assert ends == [[1.0, 4.0], [1.0, 1.0]]
    assert charts.svg(figure).startswith("<svg")


def test_values_on_a_page_are_escaped() -> None:
    page = render("rating.html.jinja", title="<a>", criteria="b & c", scale="")
    assert "<title>&lt;a&gt;</title>" in page
    assert "b &amp; c" in page


def test_images_as_uris() -> None:
    image = Image.new("RGBA", (2, 2))
    assert image_uri(image).startswith("data:image/png;base64,")
    assert image_uri(image, "JPEG").startswith("data:image/jpeg;base64,")


def test_a_sheet_lays_images_out_row_by_row() -> None:
    colours = ["red", "green", "blue", "black", "yellow"]
    page = sheet([Image.new("RGB", (10, 20), colour) for colour in colours], columns=2, gap=4)
    assert page.size == (2 * 14 + 4, 3 * 24 + 4)
    assert page.getpixel((4, 4)) == (255, 0, 0)
    assert page.getpixel((18, 28)) == (0, 0, 0)
    assert page.getpixel((20, 56)) == (255, 255, 255), "no sixth image"
    assert sheet([Image.new("RGB", (10, 20))], columns=8).size == (18, 28)
