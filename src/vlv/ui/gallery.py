"""The caption tab as HTML: cards of a page, the image, counters, progress. Everything foreign is escaped."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from vlv.data.foreign import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vlv.ui.desk import Work
    from vlv.ui.replace import Piece
    from vlv.ui.tokens import Count
    from vlv.ui.view import View

PREVIEW = 140
"""Characters of a caption on a card."""


def cards(view: View) -> str:
    """The images of the page, to be clicked."""
    album = view.album
    if album is None:
        return '<p class="vlv-empty">Open a folder above, or drop images: they are listed here.</p>'
    if not view.shown:
        return '<p class="vlv-empty">No image passes the filter.</p>'
    found = []
    for position, number in view.on_page():
        caption = album.shown_caption(number)
        name = escape(printable(album.names[number]), quote=True)
        is_current, is_marked = position == view.position, number in view.marks
        row = view.verdict(number, caption)
        badge = "" if row is None else f'<span class="vlv-badge">doubt {row["doubt"]:.0%}</span>'
        text = escape(caption[:PREVIEW]) if caption else '<i class="vlv-soft">no caption</i>'
        found.append(
            f'<div class="vlv-card{" is-current" * is_current}{" is-marked" * is_marked}">'
            f'<button type="button" class="vlv-open" data-vlv="look:{number}"'
            f'{" aria-current=true" * is_current} aria-label="{name}">'
            f'<img loading="lazy" alt="" src="/vlv/image/{album.key}/{number}/192">'
            f'<span class="vlv-name">{name}</span>{badge}<span class="vlv-text">{text}</span></button>'
            f'<button type="button" class="vlv-mark" data-vlv="mark:{number}" aria-pressed="{str(is_marked).lower()}"'
            f' aria-label="mark {name}">{"✓" if is_marked else "+"}</button></div>'
        )
    by_key = '<button type="button" id="vlv-mark-current" data-vlv="mark:current" hidden></button>'
    return f'<div class="vlv-cards">{"".join(found)}</div>{by_key}'


def where(view: View) -> str:
    """Page and counts in a line."""
    album = view.album
    if album is None:
        return ""
    total = f"{len(view.shown):,} of {len(album):,}" if view.filter else f"{len(album):,}"
    marked = f" · {len(view.marks):,} marked" if view.marks else ""
    image = f"image {view.position + 1:,}" if view.shown else "no image"
    return f'<p class="vlv-where">{total} images · {image} · page {view.page + 1:,} of {view.num_pages:,}{marked}</p>'


def picture(view: View) -> str:
    """The image that is looked at."""
    if view.album is None or view.number is None:
        return '<div class="vlv-picture"></div>'
    name = escape(printable(view.album.names[view.number]), quote=True)
    source = f"/vlv/image/{view.album.key}/{view.number}/768"
    return (
        f'<figure class="vlv-picture"><img src="{source}" alt="{name}">'
        f"<figcaption>{name}</figcaption></figure>"
    )


def counters(text: str, counts: Sequence[Count] | None) -> str:
    """Length of a caption, in words, characters and tokens; None where the model is still being loaded."""
    pieces = [f"{len(text.split())} words", f"{len(text)} characters"]
    for count in counts or ():
        of = f" of {count.limit}" if count.limit is not None else ""
        line = f"{count.tokens}{of} {count.name} tokens"
        pieces.append(f'<b class="vlv-over">{line}: the rest is cut</b>' if count.is_over else line)
    if counts is None:
        pieces.append("tokens follow once the model is loaded")
    return f'<p class="vlv-counters">{" · ".join(pieces)}</p>'


def message(text: str, kind: str = "info") -> str:
    """One sentence to the user: `info` or `error`."""
    role = "alert" if kind == "error" else "status"
    return f'<p class="vlv-message is-{kind}" role="{role}">{escape(text)}</p>' if text else ""


def progress(work: Work | None) -> str:
    """A bar, and what failed."""
    if work is None:
        return ""
    failures = "".join(f"<li>{escape(line)}</li>" for line in work.failures)
    below = f'<ul class="vlv-failures">{failures}</ul>' if failures else ""
    if not work.is_running:
        return message(work.line, "error" if work.state == "failed" else "info") + below
    bar = f'max="{work.total}" value="{work.done}"' if work.total else ""
    return f'<div role="status"><progress {bar}></progress><p>{escape(work.line)}</p></div>{below}'


def difference(name: str, pieces: Iterable[Piece]) -> str:
    """A caption with what is removed and added."""
    tags = {"kept": "span", "removed": "del", "added": "ins"}
    text = "".join(f"<{tags[kind]}>{escape(part)}</{tags[kind]}>" for kind, part in pieces if part)
    return f'<li><span class="vlv-soft">{escape(name)}</span> {text}</li>'


def commands(*lines: str) -> str:
    """Lines for the shell that do the same."""
    return f'<pre class="vlv-command" tabindex="0" aria-label="the equal command">{escape(chr(10).join(lines))}</pre>'
