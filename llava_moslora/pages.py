"""HTML pages in one file each, readable without a network: images are inside, nothing is fetched, and whatever text a
page shows, no script runs but the page's own."""

from __future__ import annotations

import base64
import hashlib
import html
import io
from collections.abc import Iterable, Sequence

from PIL import Image

STYLE = """
:root { color-scheme: light dark; --a: #2f7d5b; --b: #c9803a; --line: #8884; }
@media (prefers-color-scheme: dark) { :root { --a: #6fc59b; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } small, figcaption { color: #777; }
article { border-top: 1px solid var(--line); } td { font-variant-numeric: tabular-nums; }
"""
END = "</html>\n"


def page(title: str, body: str, style: str = "") -> str:
    """A complete document; ``body`` is HTML, ``style`` is CSS after what all pages share (``STYLE``)."""
    return f"{begin(title, style)}{body}{END}"


def begin(title: str, style: str = "", script: str = "") -> str:
    """A document up to its body, which :data:`END` follows, for a page that is written piece by piece.

    Args:
        script: JavaScript that runs once the page is read; the browser is told to run no other and to fetch nothing.
    """
    title, policy = html.escape(title), "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script:
        policy += f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        script = f"<script type=module>{script}</script>"
    return f"""<!doctype html>
<html lang=en><meta charset=utf-8><meta http-equiv=Content-Security-Policy content="{policy}">
<title>{title}</title><style>{STYLE}{style}</style>{script}
<h1>{title}</h1>"""


def table(rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> str:
    """A table of texts or numbers, escaped here."""
    lines = [_row("th", head)] if head else []
    return f"<table>{''.join([*lines, *(_row('td', row) for row in rows)])}</table>"


def thumbnail(image: Image.Image, side: int) -> str:
    """An ``<img>`` with the image in it, at most ``side`` pixels wide and high."""
    image = image.copy()
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" width={image.width} height={image.height} alt="">'


def _row(tag: str, values: Iterable[object]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(str(value))}</{tag}>' for value in values)}</tr>"
