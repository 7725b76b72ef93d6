"""The page of `vlv search --page`: what was found, as a contact sheet."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

from vlv.pages import render

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlv.search.index import Hit, Index

MOST_SHOWN = 200
"""Hits of one query."""


def make_page(index: Index, found: Sequence[tuple[str, Sequence[Hit]]], *, title: str) -> str:
    """Write the page.

    Args:
        index: That was searched.
        found: Queries as they are shown, and their hits.
        title: Of the page.

    Returns:
        A complete HTML document.
    """
    queries = [
        {
            "words": words,
            "hits": [
                {
                    "uri": _uri(index.picture(hit)),
                    "name": hit.id,
                    "score": hit.score,
                    "rank": hit.rank,
                }
                for hit in hits[:MOST_SHOWN]
            ],
        }
        for words, hits in found
    ]
    note = f"{len(index)} images, model {index.store.about['model']}"
    return render("search.html.jinja", title=title, note=note, queries=queries)


def _uri(picture: bytes) -> str:
    """A data URI; empty where there is no picture."""
    if not picture:
        return ""
    return f"data:image/jpeg;base64,{base64.b64encode(picture).decode('ascii')}"
