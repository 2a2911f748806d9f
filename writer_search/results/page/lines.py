"""The lines that the best trial gets wrong, or right by little; lines as the network sees them."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from data import LineSet
from writer_search.common.text import one_line
from writer_search.lines.predictions import FILE, Prediction
from writer_search.results.page.html import (
    count,
    folded,
    name,
    path_name,
    picture,
    soft,
    text,
)
from writer_search.results.page.snapshot import Snapshot
from writer_search.results.pictures.lines import some_lines

MOST_LINES, UNFOLDED_LINES = 40, 12
SEEN_WRITERS, UNFOLDED_WRITERS = 60, 8
# Columns of the strip that are shown of a line. Of a mistake all of it, as far as lines go: where
# one writes from right to left, its beginning comes last.
WIDTH, SEEN_WIDTH = 6000, 700
GREYS = 16  # a line of 800 x 64 pixels takes some 4 kB with them; with 256, twice that


@dataclass
class LinePictures:
    """Pictures of lines as they stand in the strip, black on white. Each is made once.

    data: None where the strip is not at hand; nothing is shown then.
    """

    data: LineSet | None
    _made: dict[tuple[int, int], str] = field(default_factory=dict)
    _index: dict[str, int] | None = None

    def of_path(self, path: str, description: str) -> str:
        """Show a line by the path that predictions.csv has of it; empty where there is none."""
        if self.data is None:
            return ""
        if self._index is None:
            paths = (p.encode("utf-8", "backslashreplace").decode() for p in self.data.paths)
            self._index = {path: line for line, path in enumerate(paths)}
        line = self._index.get(path)
        return "" if line is None else self.of(line, WIDTH, description)

    def of(self, line: int, width: int, description: str) -> str:
        assert self.data is not None
        if (line, width) not in self._made:
            try:
                self._made[line, width] = _picture(self.data, line, width, description)
            except OSError:  # somebody has emptied the cache
                return ""
        return self._made[line, width]


def _picture(data: LineSet, line: int, most: int, description: str) -> str:
    ink = data.ink(line, most).T
    levels = (255 - ink.astype(np.uint16)) * (GREYS - 1) // 255
    image = Image.fromarray(levels.astype(np.uint8), "P")
    image.putpalette([grey * 255 // (GREYS - 1) for grey in range(GREYS) for _ in range(3)])
    file = io.BytesIO()
    image.save(file, "PNG", bits=4, compress_level=3)  # in half the time, and a tenth larger
    shown = picture(file.getvalue(), description, ink.shape[1], data.line_height)
    return shown.replace("<img ", '<img class="strip" ', 1)


def wrong_lines(shown: Snapshot, pictures: LinePictures) -> str:
    """Show the surest mistakes, and what was right by little."""
    if shown.best is None:
        return ""
    if not shown.predictions:
        directory = text(shown.files.directory(shown.best))
        return soft(f"<code>{directory}/{FILE}</code> cannot be read here, or was never written.")
    wrong = sorted(
        (line for line in shown.predictions if not line.is_right),
        key=lambda line: -line.probability,
    )
    right = sorted(
        (line for line in shown.predictions if line.is_right), key=lambda line: line.probability
    )
    told = (
        f"{len(wrong)} of {count(len(shown.predictions), 'validation line')} wrong. "
        + (
            f"The {min(MOST_LINES, len(wrong))} most confident mistakes, most confident first. "
            if wrong
            else ""
        )
        + "Probabilities are the model's own. Click on a writer to see that writer's lines alone. "
        f"All lines are in <code>{text(shown.files.directory(shown.best).name)}/{FILE}</code>."
    )
    bar = (
        '<p class="filter" hidden role="status">Only <bdi dir="auto"></bdi> (<span></span> lines '
        'here). <button type="button">Show all writers</button></p>'
    )
    first, more = wrong[:UNFOLDED_LINES], wrong[UNFOLDED_LINES:MOST_LINES]
    sure = f"Right, but least sure: {count(min(MOST_LINES, len(right)), 'line')}"
    return "\n".join(
        [
            f"<p>{told}</p>",
            bar,
            _list(first, pictures),
            folded(f"{count(len(more), 'more mistake')}", _list(more, pictures), "wrong"),
            folded(sure, _list(right[:MOST_LINES], pictures), "unsure"),
        ]
    )


def _list(lines: Sequence[Prediction], pictures: LinePictures) -> str:
    items = "".join(_line(line, pictures) for line in lines)
    return f'<ul class="lines">\n{items}</ul>' if items else ""


def _line(line: Prediction, pictures: LinePictures) -> str:
    writers = json.dumps(sorted({one_line(line.writer), one_line(line.guess)}))
    said = f"{pick(line.writer)} taken for {pick(line.guess)} with "
    if line.is_right:
        said = f"{pick(line.writer)} with "
    own = (
        ""
        if line.is_right
        else f"; the true writer has {100 * line.probability_of_writer:.1f}&nbsp;%"
    )
    return (
        f'<li data-writers="{text(writers, 10**4)}">'
        f"{pictures.of_path(line.path, f'Line {line.path} by {line.writer}')}"
        f"<p>{said}<strong>{100 * line.probability:.1f}&nbsp;%</strong>{own}</p>"
        f'<p class="soft">{path_name(line.path)}</p></li>\n'
    )


def pick(writer: str) -> str:
    """Make a writer's name a button that shows that writer's lines alone."""
    return (
        f'<button type="button" class="pick" data-writer="{text(writer, 300)}">{name(writer)}'
        "</button>"
    )


def seen_lines(pictures: LinePictures) -> str:
    """Show lines of each writer as the network sees them: turned, inverted or empty ones show."""
    data = pictures.data
    if data is None:
        return ""
    shown = []
    for writer in data.writers[:SEEN_WRITERS]:
        lines = "".join(
            pictures.of(line, SEEN_WIDTH, f"Training line {data.paths[line]}")
            for line in some_lines(data, writer)
        )
        shown.append(f"<li><p>{name(writer)}</p>{lines}</li>\n" if lines else "")
    if not any(shown):
        return ""
    left = len(data.writers) - SEEN_WRITERS
    more = "".join(shown[UNFOLDED_WRITERS:])
    return "\n".join(
        [
            "<p>Three training lines of each writer, after decoding; of long ones the left part. "
            "Lines that lie on their side, stand on their head, are white on black or empty were "
            "read wrongly.</p>",
            f'<ul class="lines">\n{"".join(shown[:UNFOLDED_WRITERS])}</ul>',
            folded(
                f"{count(len(shown) - UNFOLDED_WRITERS, 'more writer')}",
                f'<ul class="lines">\n{more}</ul>' if more else "",
                "seen",
            ),
            soft(f"{count(left, 'more writer')} not shown.") if left > 0 else "",
        ]
    )
