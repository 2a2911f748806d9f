"""Shows lines of each writer as the network sees them: a set read wrongly is seen at a glance."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import LineSet
from writer_search.common.files import write_whole
from writer_search.common.text import one_line

FIRST_WRITERS = 12  # the report shows more
LINES_EACH = 3
WIDTH = 1000  # pixels that are shown of a line
LABEL, GAP = 18, 6  # pixels
FONT = "DejaVuSans.ttf"  # of most Linux systems; has Arabic letters; Pillow's own has ASCII


def draw_lines(summary: Path, data: LineSet) -> None:
    """Write lines.png into a directory. Failing to costs no search: it is told in a warning.

    A search that goes on has the same lines, and their picture.
    """
    if (summary / "lines.png").exists():
        return
    try:
        picture = lines_picture(data, data.writers[:FIRST_WRITERS])
        write_whole(summary / "lines.png", partial(picture.save, format="PNG"))
    except OSError as error:
        print(f"warning: summary/lines.png was not written: {one_line(error)}", file=sys.stderr)


def lines_picture(data: LineSet, writers: Sequence[str]) -> Image.Image:
    """Draw the first, middle and last training line of each writer, black on white."""
    chosen = {writer: some_lines(data, writer) for writer in writers}
    rows = sum(map(len, chosen.values()))
    height = len(writers) * (LABEL + GAP) + rows * (data.line_height + 2)
    picture = Image.new("L", (WIDTH, height), 255)
    draw, top = ImageDraw.Draw(picture), 0
    for writer, lines in chosen.items():
        label, font = _label(writer)
        draw.text((2, top + 2), label, fill=0, font=font)
        top += LABEL
        for line in lines:
            picture.paste(Image.fromarray(255 - data.ink(line, WIDTH).T), (0, top))
            top += data.line_height + 2
        draw.line((0, top, WIDTH, top), fill=200)
        top += GAP
    return picture


def some_lines(data: LineSet, writer: str) -> list[int]:
    """Choose the first, middle and last training line of a writer."""
    own = np.flatnonzero((data.labels == data.writers.index(writer)) & (data.splits == 0))
    if not len(own):
        return []
    places = np.unique(np.linspace(0, len(own) - 1, LINES_EACH).round().astype(int))
    return [int(line) for line in own[places]]


def _label(writer: str) -> tuple[str, Any]:
    """Give a name, and a font that has its letters; where none has, letters as their codes."""
    name = one_line(writer, 100)
    plain = name.encode("ascii", "backslashreplace").decode()
    if name == plain:
        return name, ImageFont.load_default()
    try:
        font = ImageFont.truetype(FONT, 12)
    except OSError:  # this system has no such font
        return plain, ImageFont.load_default()
    unknown = bytes(font.getmask("\U0010ffff"))
    has_all = all(bytes(font.getmask(letter)) != unknown for letter in name)
    return (name, font) if has_all else (plain, ImageFont.load_default())
