"""Pictures of made-up searches: drawn whole, from any names, or with a line that says why not."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from searches import make_search

from writer_search.results.pictures import figures
from writer_search.results.pictures import trials as plots
from writer_search.results.pictures.trials import (
    PICTURES,
    draw_all,
    draw_curves,
    draw_missing_curves,
)
from writer_search.results.rows import DATABASE, read_database, trial_dir

HOSTILE = ["$x_1$", "a" * 300, "line\nbreak", "<b>&amp;", "فارسی", "\udcff\x00"]


def is_whole_picture(path: Path) -> bool:
    with Image.open(path) as image:
        image.load()
        return image.format == "PNG" and min(image.size) > 200


def draw(directory: Path) -> list[str]:
    return draw_all(directory, read_database(directory / DATABASE).trials)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Sixteen trials, writers of hostile names, drawn."""
    directory = tmp_path_factory.mktemp("search") / "c"
    make_search(directory, 16, HOSTILE)
    return directory, draw(directory)


def test_every_picture_is_drawn_whole(drawn: tuple[Path, list[str]]) -> None:
    directory, missing = drawn
    assert missing == []
    pictures = {path.name for path in (directory / "summary").glob("*.png")}
    assert pictures == set(PICTURES)
    assert all(is_whole_picture(directory / "summary" / name) for name in pictures)
    assert not list((directory / "summary").glob(".*"))


def test_drawing_only_reads_the_database(drawn: tuple[Path, list[str]], tmp_path: Path) -> None:
    directory = tmp_path / "c"
    directory.mkdir()
    shutil.copy(drawn[0] / DATABASE, directory)
    (directory / DATABASE).chmod(0o444)
    before = (directory / DATABASE).read_bytes()
    trials = read_database(directory / DATABASE).trials
    assert [trial.number for trial in trials] == list(range(16))
    assert (directory / DATABASE).read_bytes() == before
    assert [path.name for path in directory.iterdir()] == [DATABASE]


def test_too_little_is_told_and_leaves_no_older_picture(tmp_path: Path) -> None:
    make_search(tmp_path, 1, confusion=False)
    (tmp_path / "summary" / "history.png").write_bytes(b"of another state")
    told = dict(line.split(": ", 1) for line in draw(tmp_path))
    assert told == {
        "history.png": "needs 2 complete trials, there are 1",
        "importances.png": "needs 10 complete trials, there are 1",
        "parallel_coordinates.png": "needs 3 complete trials, there are 1",
        "slices.png": "needs 3 complete trials, there are 1",
        "durations.png": "needs 2 finished trials, there are 1",
        "confusion.png": "the best trial has recorded no confusion matrix",
    }
    there = {path.name for path in (tmp_path / "summary").glob("*.png")}
    assert there == {"learning_curves.png", "writers.png"}


def test_picture_that_fails_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(search: Any) -> Any:
        raise ValueError("a picture's\nown mistake")

    def works(search: Any) -> Any:
        return figures.empty_figure(3, 3)

    monkeypatch.setattr(plots, "PICTURES", {"a.png": fails, "b.png": works})
    assert draw_all(tmp_path_with_summary(tmp_path), []) == [
        'a.png: could not be drawn: ValueError("a picture\'s\\nown mistake")'
    ]
    assert is_whole_picture(tmp_path / "summary" / "b.png")


def tmp_path_with_summary(directory: Path) -> Path:
    (directory / "summary").mkdir()
    return directory


def test_without_matplotlib_a_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw_all(tmp_path, []) == [plots.NO_MATPLOTLIB]
    draw_missing_curves(tmp_path, [])
    assert not list(tmp_path.iterdir())


def test_curves_of_finished_trials_are_drawn_once(
    drawn: tuple[Path, list[str]], tmp_path: Path
) -> None:
    trials = read_database(drawn[0] / DATABASE).trials[:2]
    for number in (0, 1):
        shutil.copytree(trial_dir(drawn[0], number), trial_dir(tmp_path, number))
    (tmp_path / "trial_001" / "curves.png").write_bytes(b"there")
    draw_missing_curves(tmp_path, trials)
    assert is_whole_picture(tmp_path / "trial_000" / "curves.png")
    assert (tmp_path / "trial_001" / "curves.png").read_bytes() == b"there"


def test_curves_need_two_epochs(tmp_path: Path) -> None:
    row = {"epoch": 1, "train_loss": 1.0, "macro_top1": 0.5, "learning_rate": 0.1}
    (tmp_path / "history.jsonl").write_text(json.dumps(row) + "\n")
    told = draw_curves(tmp_path)
    assert told == "needs 2 epochs, there are 1"
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("limits", [(3e-4, 6e-3), (1.2e-3, 2.9e-3), (1e-5, 0.5)])
def test_labels_of_a_log_axis_do_not_crowd(limits: tuple[float, float]) -> None:
    axes = figures.empty_figure(3, 3).subplots()
    axes.plot(limits, (0, 1))
    figures.label_log_axis(axes)
    low, high = axes.get_xlim()
    labels = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert 1 <= len(labels) <= 6


def test_names_become_short_plain_labels() -> None:
    assert figures.short_name("a" * 100, 11) == "aaaaa…aaaaa"
    assert figures.short_name("$x$") == r"\$x\$"
    assert "\n" not in figures.short_name("a\nb")
