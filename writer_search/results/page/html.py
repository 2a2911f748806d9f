"""Pieces of a page. Whatever stands in a search's files goes in as text, never as markup."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from writer_search.common.text import one_line

Key = str | float | int | None


def text(value: object, limit: int = 2000) -> str:
    """Make anything a piece of the page: one line, printable, nothing in it is markup."""
    return html.escape(one_line(value, limit))


def name(value: object) -> str:
    """Make a name of a writer, a page or a file: it runs the way that its own letters run."""
    return f'<bdi dir="auto">{text(value)}</bdi>'


def path_name(value: object) -> str:
    """Make a path: it runs from left to right, whatever the letters of its names."""
    return f'<bdi dir="ltr">{text(value)}</bdi>'


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def section(title: str, content: str, anchor: str = "") -> str:
    """Make a section with its heading; nothing where it has no content."""
    where = f' id="{anchor}"' if anchor else ""
    return f"<section{where}>\n<h2>{text(title)}</h2>\n{content}\n</section>" if content else ""


def part(title: str, content: str) -> str:
    return f"<h3>{text(title)}</h3>\n{content}" if content else ""


def folded(title: str, content: str, key: str) -> str:
    """Make a part that is opened by a click; key: by which it is found open after a refresh."""
    if not content:
        return ""
    return f'<details data-keep="{key}"><summary>{text(title)}</summary>\n{content}\n</details>'


def soft(content: str) -> str:
    return f'<p class="soft">{content}</p>'


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Make a table of names and values."""
    rows = "".join(
        f'<tr><th scope="row">{text(key)}</th><td>{text(value)}</td></tr>\n' for key, value in pairs
    )
    return f'<table class="facts">\n<tbody>{rows}</tbody>\n</table>' if rows else ""


def wide(content: str, label: str) -> str:
    """Make a box of its own for what may be wider than the screen: it scrolls there."""
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{text(label)}">\n{content}\n'
        "</div>"
    )


@dataclass(frozen=True)
class Column:
    """A column of a table that a click sorts.   number: its values stand right."""

    title: str
    number: bool = False


def cell(content: str, key: Key = "", *, number: bool = False, kind: str = "") -> str:
    """Make a cell of ready content; key: what it is sorted by, where that is not what it shows."""
    classes = " ".join(filter(None, ["number" if number else "", kind]))
    own = f' class="{classes}"' if classes else ""
    by = f' data-key="{text("" if key is None else key)}"' if number or key != "" else ""
    return f"<td{own}{by}>{content}</td>"


def table(key: str, label: str, columns: Sequence[Column], rows: Iterable[str]) -> str:
    """Make a table that is sorted by a click on a column's title.

    rows: whole `<tr>`s.   key: by which its order is found again after a refresh.
    """
    heads = "".join(
        f'<th scope="col"{" class=number" if column.number else ""}>'
        f'<button type="button">{text(column.title)}</button></th>'
        for column in columns
    )
    body = "\n".join(rows)
    return wide(
        f'<table class="sortable" data-keep="{key}">\n<thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table>",
        label,
    )


def share_bar(share: float) -> str:
    """Draw a share as a bar that stands behind no text."""
    return f'<span class="bar" aria-hidden="true"><i style="width:{100 * share:.1f}%"></i></span>'


def picture(content: bytes, description: str, width: int, height: int, kind: str = "png") -> str:
    """Put a picture into the page itself."""
    encoded = base64.b64encode(content).decode()
    return (
        f'<img alt="{text(description)}" width="{width}" height="{height}" '
        f'src="data:image/{kind};base64,{encoded}">'
    )
