"""summary/lines.png: some lines of each writer, as the network sees them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import LineSet
from writer_search.results.pictures import lines as pictures
from writer_search.results.pictures.lines import FIRST_WRITERS, draw_lines, lines_picture


def shows(picture: Image.Image, data: LineSet, line: int) -> bool:
    """Tell whether a line stands somewhere at the left edge of a picture."""
    shown = 255 - np.asarray(picture)
    ink = data.strip[data.starts[line] :][: data.widths[line]].T[:, : shown.shape[1]]
    return any(
        np.array_equal(shown[top : top + len(ink), : ink.shape[1]], ink)
        for top in range(len(shown) - len(ink) + 1)
    )


def test_three_training_lines_of_each_writer_are_shown(data: LineSet) -> None:
    picture = lines_picture(data, data.writers)
    for label in range(len(data.writers)):
        own = np.flatnonzero((data.labels == label) & (data.splits == 0))
        assert sum(shows(picture, data, int(line)) for line in own) == 3
        assert shows(picture, data, int(own[0]))
    held_out = np.flatnonzero(data.splits != 0)
    assert not any(shows(picture, data, int(line)) for line in held_out)


def test_of_many_writers_the_first_are_drawn(data: LineSet, tmp_path: Path) -> None:
    names = tuple(f"كاتب {number}" for number in range(30))
    many = replace(data, writers=names, labels=np.arange(len(data.labels)) % 30)
    draw_lines(tmp_path, many)
    with Image.open(tmp_path / "lines.png") as drawn:
        assert drawn.size == lines_picture(many, names[:FIRST_WRITERS]).size


@pytest.mark.parametrize("name", ["\u0643\u0627\u062a\u0628", "Ren\u00e9", "\u6587", "anna"])
def test_names_are_in_letters_that_the_font_has(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = name.encode("ascii", "backslashreplace").decode()
    label, font = pictures._label(name)
    if label == name != codes:  # this system has the font
        unknown = bytes(font.getmask("\U0010ffff"))
        assert all(bytes(font.getmask(letter)) != unknown for letter in name)
    else:
        assert label == codes
    monkeypatch.setattr(pictures, "FONT", "no such font")
    assert pictures._label(name)[0] == codes


def test_a_picture_that_cannot_be_written_is_a_warning(
    data: LineSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_lines(tmp_path / "missing", data)
    assert "warning: summary/lines.png was not written" in capsys.readouterr().err
