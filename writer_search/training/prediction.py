"""Tells whose hand line images are in, with a saved model.

Images are decoded as for training, line by line; no cache is read or written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from model import WriterModel
from writer_search.common.errors import UserError
from writer_search.common.text import counted, csv_text, one_line
from writer_search.config import TrialConfig
from writer_search.lines.decoding import BrokenImageError, DecodedLine, decode_line
from writer_search.lines.parallel import in_order
from writer_search.lines.report import doubt_of
from writer_search.lines.walk import LeftOut, describe_left_out, walk
from writer_search.training.batches import Lines
from writer_search.training.evaluation import line_logits
from writer_search.training.optimisation import for_use_on

LINES_AT_ONCE = 256  # decoded lines in memory: 15 MB at 64 px


@dataclass(frozen=True)
class Guess:
    """Whose hand a line or a page is in. Probabilities are fractions, of all writers' the sum is 1.

    image: None for a page.   lines: how many lines were averaged.   unsure: whether validation
    lines of such a probability were often wrong, see `certainty`; None of pages, and where nobody
    knows.
    """

    image: str | None
    page: str
    lines: int
    writer: str
    probability: float
    runner_up: str
    runner_up_probability: float
    unsure: bool | None = None


@dataclass(frozen=True)
class Predictions:
    """What a model says of images, in the order in which they were given.

    skipped: image or directory → why nothing can be said of it, or of some files in it.
    doubtful: image → why its guess may be worth nothing, though there is one.
    sure_from: the probability below which a line is unsure; None: the model's file does not tell.
    """

    lines: list[Guess]
    pages: list[Guess]
    skipped: dict[str, str]
    doubtful: dict[str, str]
    sure_from: float | None = None


@torch.inference_mode()
def predict(
    model: WriterModel,
    config: TrialConfig,
    writers: Sequence[str],
    paths: Sequence[Path],
    device: torch.device,
    sure_from: float | None = None,
) -> Predictions:
    """Predict the writer of each image, and of each page: the directory that images lie in.

    sure_from: see `Predictions`.

    A line's probabilities are the softmax of its windows' mean logits. A page's are those of the
    mean log-softmax of its lines, so that a sure line weighs more than an unsure one.
    Raises UserError when the model's output is not finite.
    """
    config = for_use_on(config, device)
    images, skipped = _find(paths)
    doubtful = {}
    model.to(device)
    scores: dict[Path, Tensor] = {}  # log-softmax, (writers,), float64
    for decoded in tqdm(list(_in_parts(images)), "predicting", disable=None, leave=False):
        inks = {}
        for path, line in _decode(decoded, config.line_height):
            if isinstance(line, str):
                skipped[str(path)] = line
                continue
            inks[path] = line.ink
            if doubt := doubt_of(line):
                doubtful[str(path)] = doubt
        if inks:
            lines = _side_by_side(list(inks.values()), config.line_height, device)
            logits = line_logits(model, config, lines, len(writers)).double().cpu()
            scores |= zip(inks, F.log_softmax(logits, 1), strict=True)
    if not all(score.isfinite().all() for score in scores.values()):
        raise UserError("the model's output is not finite: it cannot be used")
    pages: dict[Path, list[Path]] = {}  # by its real path
    for path in scores:
        pages.setdefault(path.parent.resolve(), []).append(path)
    return Predictions(
        [marked(_guess(scores[path], writers, path, [path]), sure_from) for path in scores],
        [
            _guess(torch.stack([scores[p] for p in own]).mean(0), writers, None, own)
            for own in pages.values()
        ],
        skipped,
        doubtful,
        sure_from,
    )


def marked(guess: Guess, sure_from: float | None) -> Guess:
    """Mark a line's guess as unsure, or not; leave it where nobody knows."""
    unsure = None if sure_from is None else guess.probability < sure_from
    return replace(guess, unsure=unsure)


def _find(paths: Sequence[Path]) -> tuple[list[Path], dict[str, str]]:
    """Find the images, each once: given themselves, or in directories. Also what is none."""
    found: dict[tuple[Path, str], Path] = {}
    skipped = {}

    def unreadable(place: Path, error: OSError) -> None:
        skipped[str(place)] = one_line(error, 150)

    for path in paths:
        left_out, images = LeftOut(), [path]
        try:
            if path.is_dir():
                pages = walk(path, left_out, onerror=unreadable)
                images = [Path(image.path) for _, in_page in pages for image in in_page]
        except OSError as error:
            unreadable(path, error)
            continue
        not_looked_at = describe_left_out(left_out.report(), all_kinds=not images)
        if not images:
            there_are = f"; there are {not_looked_at}" if not_looked_at else ""
            skipped.setdefault(str(path), f"no images in this directory{there_are}")
        elif not_looked_at:
            skipped[str(path)] = f"not looked at: {not_looked_at}"
        for image in images:
            found.setdefault((image.parent.resolve(), image.name), image)
    return list(found.values()), skipped


def _in_parts(images: Sequence[Path]) -> Iterator[Sequence[Path]]:
    for start in range(0, len(images), LINES_AT_ONCE):
        yield images[start : start + LINES_AT_ONCE]


def _decode(images: Sequence[Path], line_height: int) -> list[tuple[Path, DecodedLine | str]]:
    """Decode images into ink, or say why one cannot be."""

    def read(path: Path) -> DecodedLine | str:
        try:
            return decode_line(path.read_bytes(), line_height)
        except (OSError, BrokenImageError) as error:
            return one_line(error, 150)
        except MemoryError:
            return "out of memory"

    with in_order(read, images) as results:
        return list(zip(images, results, strict=True))


def _side_by_side(
    inks: Sequence[NDArray[np.uint8]], line_height: int, device: torch.device
) -> Lines:
    """Lay decoded lines (width, line_height) out as `Lines` has them; labels and pages are 0."""
    strip = np.concatenate([np.zeros((1, line_height), np.uint8), *inks])
    widths = np.array([len(ink) for ink in inks], np.int64)
    starts = 1 + np.cumsum(widths) - widths
    on_device = [torch.from_numpy(array).to(device) for array in (strip, starts, widths)]
    nothing = torch.zeros_like(on_device[2])
    return Lines(on_device[0], on_device[1], on_device[2], nothing, nothing, device)


def _guess(
    log_probabilities: Tensor, writers: Sequence[str], image: Path | None, lines: Sequence[Path]
) -> Guess:
    """Name the two most probable writers; ties go to the first."""
    probabilities = log_probabilities.softmax(0)  # a mean of logarithms does not sum to 1 by itself
    best, second = torch.argsort(probabilities, descending=True, stable=True)[:2].tolist()
    return Guess(
        None if image is None else str(image),
        str(lines[0].parent),
        len(lines),
        writers[best],
        float(probabilities[best]),
        writers[second],
        float(probabilities[second]),
    )


# -------------------------------------------------------------------------------- for people


def as_json(predictions: Predictions) -> str:
    """Give all of it as one JSON object."""
    found: dict[str, Any] = asdict(predictions)
    return json.dumps(found, indent=2, allow_nan=False)


def as_csv(predictions: Predictions) -> str:
    """Give lines and pages as one table; a page has no image."""
    guesses = [asdict(guess).values() for guess in [*predictions.lines, *predictions.pages]]
    return csv_text([Guess.__dataclass_fields__, *guesses]).rstrip("\n")


def as_table(predictions: Predictions) -> str:
    """Give two aligned tables: lines, then pages."""
    columns = ["writer", "probability", "runner-up", "probability"]
    lines = _aligned(["image", *columns], predictions.lines, lambda guess: [str(guess.image)])
    pages = _aligned(
        ["page", "lines", *columns], predictions.pages, lambda guess: [guess.page, str(guess.lines)]
    )
    return f"{lines}\n\n{pages}\n\n{certainty_text(predictions)}"


def certainty_text(predictions: Predictions) -> str:
    """Say how many lines are unsure, and what that means."""
    if predictions.sure_from is None:
        return (
            "How often such guesses are wrong is not known: this model was not validated, or an "
            "earlier version wrote it."
        )
    unsure = sum(guess.unsure is True for guess in predictions.lines)
    which = f"{unsure} of {counted(len(predictions.lines), 'line')} unsure: "
    if predictions.sure_from > 1:
        return f"{which}too few validation lines were right, or there are too few of them."
    return (
        f"{which}below {100 * predictions.sure_from:.1f} %, a guess is not backed by nine right "
        "validation lines in ten."
    )


def _aligned(
    header: list[str], guesses: Sequence[Guess], first: Callable[[Guess], list[str]]
) -> str:
    marks = any(guess.unsure for guess in guesses)
    rows = [header + ([""] if marks else [])] + [
        [
            *first(guess),
            guess.writer,
            f"{100 * guess.probability:.1f} %",
            guess.runner_up,
            f"{100 * guess.runner_up_probability:.1f} %",
            *(["unsure" if guess.unsure else ""] if marks else []),
        ]
        for guess in guesses
    ]
    shown = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in shown) for column in range(len(rows[0]))]
    numbers = {column for column, name in enumerate(header) if name in ("probability", "lines")}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in shown
    )
