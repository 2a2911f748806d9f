"""Draws what one trial recognises of each writer, and whom it takes for whom."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from writer_search.results.confusion import confusion_of
from writer_search.results.pictures.figures import (
    BLUE,
    VERMILLION,
    TooLittleError,
    empty_figure,
    short_name,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED_WRITERS = 60  # more names than this cannot be read beside each other
WORST_WRITERS = 40


def writers_picture(number: int, metrics: Mapping[str, Any]) -> Figure:
    """Draw the best trial's accuracy for each writer, the worst first."""
    shares: dict[str, float] = metrics.get("per_writer") or {}
    if not shares:
        raise TooLittleError(f"trial {number} has recorded no writers")
    lines = _lines_of_writers(metrics)
    ordered = sorted((100 * share, name) for name, share in shares.items())
    many = len(ordered) > NAMED_WRITERS
    named = ordered[:WORST_WRITERS] if many else ordered
    figure = empty_figure(11 if many else 9, max(3.0, 1.4 + 0.19 * len(named)))
    panels = figure.subplots(1, 2 if many else 1, squeeze=False).ravel()
    axes = panels[0]
    positions = range(len(named), 0, -1)
    axes.barh(positions, [percent for percent, _ in named], color=BLUE, height=0.75)
    axes.set_yticks(positions, [short_name(name) for _, name in named], fontsize=8)
    for position, (percent, name) in zip(positions, named, strict=True):
        of = f" of {lines[name]}" if name in lines else ""
        inside = percent >= 40
        axes.text(
            percent - 1 if inside else percent + 1,
            position,
            f"{percent:.1f} %{of}",
            ha="right" if inside else "left",
            va="center",
            fontsize=8,
            color="white" if inside else "black",
        )
    mean = float(np.mean([percent for percent, _ in ordered]))
    axes.axvline(mean, color=VERMILLION, linestyle="--", label=f"mean of writers: {mean:.2f} %")
    axes.set_xlim(0, 102)
    axes.set_xticks(range(0, 101, 20))
    axes.set_ylim(0.3, len(named) + 0.7)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("Validation lines recognised (%)")
    worst = f"the {len(named)} worst of {len(ordered)}" if many else f"{len(ordered)}"
    axes.set_title(f"Trial {number}: {worst} writers")
    figure.legend(loc="outside lower center")
    if many:
        panels[1].hist([percent for percent, _ in ordered], bins=range(0, 101, 5), color=BLUE)
        panels[1].axvline(mean, color=VERMILLION, linestyle="--")
        panels[1].set_xlabel("Validation lines recognised (%)")
        panels[1].set_ylabel("Writers")
        panels[1].set_title(f"All {len(ordered)} writers")
    return figure


def _lines_of_writers(metrics: Mapping[str, Any]) -> dict[str, int]:
    """Count each writer's validation lines, where the confusion matrix is there to tell."""
    try:
        names, counts = _confusion_of(metrics)
    except TooLittleError:
        return {}
    return dict(zip(names, (int(total) for total in counts.sum(axis=1)), strict=True))


def _confusion_of(metrics: Mapping[str, Any]) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Give the writers' names and the counts (true writer, guessed writer)."""
    if not metrics.get("confusion"):
        raise TooLittleError("the best trial has recorded no confusion matrix")
    try:
        names, pairs = confusion_of(metrics)
    except ValueError:
        raise TooLittleError("the best trial's confusion matrix cannot be read") from None
    if len(names) < 2:
        raise TooLittleError("the best trial's confusion matrix cannot be read")
    counts = np.zeros((len(names), len(names)))
    for true, guessed, lines in pairs:
        counts[true, guessed] = lines
    return names, counts


def confusion_picture(number: int, metrics: Mapping[str, Any]) -> Figure:
    """Draw whom the best trial takes for whom, and list the commonest mistakes."""
    from matplotlib.colors import PowerNorm

    names, counts = _confusion_of(metrics)
    size = len(names)
    side = min(9.5, max(4.5, 1.5 + 0.3 * size))
    figure = empty_figure(side + 4.6, side + 0.3)
    axes, beside = figure.subplots(1, 2, width_ratios=[side, 3.6])
    percents = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # Rare mistakes are what one looks for: a square-root scale lifts them, zeros stay white.
    picture = axes.imshow(
        np.ma.masked_equal(percents, 0.0),
        cmap="viridis_r",
        norm=PowerNorm(0.5, 0, 100),
        interpolation="nearest",
    )
    step = 1 if size <= NAMED_WRITERS else math.ceil(size / 40)
    ticks = range(0, size, step)
    font = 8 if size <= 30 else 6
    labels = [short_name(names[i], 20) for i in ticks]
    axes.set_xticks(ticks, labels, rotation=90, fontsize=font)
    axes.set_yticks(ticks, labels, fontsize=font)
    axes.grid(visible=False)
    axes.set_xlabel("Taken for")
    axes.set_ylabel("True writer")
    axes.set_title(f"Trial {number}: {int(counts.sum())} validation lines of {size} writers")
    if size <= 30:
        _write_counts(axes, counts, percents, 8 if size <= 16 else 6)
    bar = figure.colorbar(picture, ax=axes, fraction=0.04, pad=0.01, ticks=[1, 5, 20, 50, 100])
    bar.set_label("Lines of the true writer (%)")
    beside.axis("off")
    beside.text(0, 1, _mistakes(names, counts), va="top", fontsize=9, linespacing=1.5)
    return figure


def _write_counts(
    axes: Axes, counts: np.ndarray[Any, Any], percents: np.ndarray[Any, Any], font: float
) -> None:
    for row, column in np.argwhere(counts > 0):
        colour = "white" if percents[row, column] > 25 else "black"
        axes.text(
            column,
            row,
            f"{counts[row, column]:.0f}",
            ha="center",
            va="center",
            fontsize=font,
            color=colour,
        )


def _mistakes(names: Sequence[str], counts: np.ndarray[Any, Any], limit: int = 12) -> str:
    """List the commonest mistakes in words."""
    wrong = counts - np.diag(np.diag(counts))
    pairs = sorted((-wrong[i, j], i, j) for i, j in np.argwhere(wrong > 0))
    if not pairs:
        return "No mistakes."
    lines = [f"Mistakes: {int(wrong.sum())} lines, {len(pairs)} pairs of writers", ""]
    for negative, true, guessed in pairs[:limit]:
        of = f"{-negative:.0f} of {counts[true].sum():.0f} lines"
        lines.append(
            f"{short_name(names[true], 20)}\n    as {short_name(names[guessed], 20)}: {of}"
        )
    return "\n".join(lines)
