"""predictions.csv of a trial: whom its best epoch takes each validation line, and page, for."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from writer_search.common.files import write_text
from writer_search.common.text import csv_text
from writer_search.lines.layout import SPLITS

FILE = "predictions.csv"


@dataclass(frozen=True)
class Prediction:
    """One validation line. Bytes of names that are not UTF-8 stand as their escapes."""

    path: str  # below the data root
    writer: str
    page: str  # the directory's path below the writer; empty where there is none
    guess: str
    probability: float  # of the guess
    probability_of_writer: float
    page_guess: str  # whom the lines of the page together are taken for

    @property
    def is_right(self) -> bool:
        return self.guess == self.writer


NAMES = [each.name for each in fields(Prediction)]


def page_of(path: str, writer: str) -> str:
    """Give the directories between a writer and an image; empty where there are none."""
    for top in (*(f"{split}/{writer}/" for split in SPLITS), f"{writer}/"):
        if path.startswith(top):
            return path.removeprefix(top).rpartition("/")[0]
    return ""


def write_predictions(
    directory: Path,
    paths: Sequence[str],
    labels: Iterable[int],
    writers: Sequence[str],
    predictions: Iterable[tuple[float, float, float, float]],
) -> None:
    """Write predictions.csv, whole.

    predictions: of each line guess, its probability, the true writer's, and the page's guess; see
    `Metrics.predictions`.
    """
    rows: list[list[str]] = [NAMES]
    for path, label, (guess, p, p_true, page_guess) in zip(paths, labels, predictions, strict=True):
        writer = writers[label]
        shares = f"{p:.5f}", f"{p_true:.5f}"
        page, own = page_of(path, writer), writers[int(page_guess)]
        rows.append([path, writer, page, writers[int(guess)], *shares, own])
    write_text(directory / FILE, csv_text(rows))


def read_predictions(directory: Path) -> list[Prediction]:
    """Read a trial's predictions, in the lines' order; empty where there are none, or not ours."""
    try:
        with open(directory / FILE, encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
            if header != NAMES:
                return []
            found = [
                Prediction(path, writer, page, guess, float(p), float(p_true), page_guess)
                for path, writer, page, guess, p, p_true, page_guess in rows
            ]
    except (OSError, ValueError, IndexError, csv.Error):
        return []
    return found if all(math.isfinite(line.probability) for line in found) else []
