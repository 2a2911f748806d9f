"""Draws a search for people: pictures in summary/, and each trial's own curves.

Needs matplotlib, which is imported when the first picture is drawn, without pyplot or a display.
All pictures are drawn here rather than by Optuna's figures: values in percent, pruned and failed
trials marked, the best trial in one colour throughout, legible with 300 trials.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from writer_search.common.files import read_json
from writer_search.common.text import shown_value
from writer_search.results.pictures.figures import (
    ACCURACY,
    BLUE,
    DARK,
    GREEN,
    GREY,
    PALE,
    VERMILLION,
    TooLittleError,
    empty_figure,
    label_log_axis,
    limit_values,
    lowest_shown,
    mark_below,
    matplotlib_is_there,
    on_axis,
    short_name,
    try_to_draw,
    whole_numbers,
)
from writer_search.results.pictures.writers import confusion_picture, writers_picture
from writer_search.results.rows import home_of, read_history, trial_dir

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Draw = Callable[["Search"], Figure]

NO_MATPLOTLIB = "no pictures: matplotlib is not installed (pip install matplotlib)"
TRIALS_FOR_IMPORTANCES = 10  # with fewer, PED-ANOVA tells chance
TRIALS_FOR_COMPARISONS = 3
TOP_TRIALS = 5  # that PED-ANOVA's best group should hold at least, says its documentation


@dataclass(frozen=True)
class Search:
    """What the pictures are drawn from: finished trials, and the directory of their search."""

    checkpoint_dir: Path
    finished: Sequence[FrozenTrial]

    @property
    def complete(self) -> list[FrozenTrial]:
        return [t for t in self.finished if t.state == TrialState.COMPLETE and t.value is not None]

    @property
    def best(self) -> FrozenTrial:
        """Give the complete trial with the highest value, the earliest of equals."""
        return max(self.complete, key=lambda trial: (_value(trial), -trial.number))

    def require(self, count: int) -> None:
        """Raise TooLittleError when fewer trials than that are complete."""
        if len(self.complete) < count:
            trials = "trial" if count == 1 else "trials"
            there = len(self.complete)
            raise TooLittleError(f"needs {count} complete {trials}, there are {there}")


def draw_all(checkpoint_dir: Path, trials: Sequence[FrozenTrial]) -> list[str]:
    """Draw the pictures of a search into summary/, each file whole.

    Returns a line for each picture that was not drawn, saying why, and removes an older one of the
    same name, which would show another state. Without matplotlib the only line says that. A picture
    that fails does not stop the others.
    """
    if not matplotlib_is_there():
        return [NO_MATPLOTLIB]
    finished = [trial for trial in trials if trial.state.is_finished()]
    search = Search(checkpoint_dir, finished)
    directory = checkpoint_dir / "summary"
    directory.mkdir(exist_ok=True)
    missing = []
    for name, draw in PICTURES.items():
        reason = try_to_draw(directory / name, partial(draw, search))
        if reason is not None:
            missing.append(f"{name}: {reason}")
    return missing


def draw_missing_curves(checkpoint_dir: Path, trials: Sequence[FrozenTrial]) -> None:
    """Draw curves.png of each finished trial in checkpoint_dir that has none, if matplotlib can."""
    if not matplotlib_is_there():
        return
    for trial in trials:
        directory = trial_dir(checkpoint_dir, trial.number)
        has_curves = (directory / "curves.png").exists()
        if trial.state.is_finished() and directory.is_dir() and not has_curves:
            draw_curves(directory)


def draw_curves(directory: Path) -> str | None:
    """Draw a trial's history.jsonl into its curves.png; return why it was not drawn, if so."""
    return try_to_draw(directory / "curves.png", lambda: _curves(directory))


def _value(trial: FrozenTrial) -> float:
    """Give the value of a complete trial in percent."""
    return 100 * float(trial.value or 0.0)


def _percents(trial: FrozenTrial) -> tuple[list[int], list[float]]:
    """Give a trial's epochs and its values there in percent, finite ones only."""
    known = [(e, 100 * v) for e, v in sorted(trial.intermediate_values.items()) if math.isfinite(v)]
    return [epoch for epoch, _ in known], [value for _, value in known]


def _history(search: Search) -> Figure:
    """Draw the value of each trial, and the best so far."""
    search.require(2)
    figure = empty_figure(9, 4.8)
    axes = figure.subplots()
    values = [_value(trial) for trial in search.complete]
    pruned = [(t.number, _percents(t)[1]) for t in search.finished if t.state == TrialState.PRUNED]
    last = [(number, percents[-1]) for number, percents in pruned if percents]
    floor, top = lowest_shown(values), max([*values, *(value for _, value in last)])
    size = 34 if len(search.finished) <= 60 else 14
    axes.scatter(
        [trial.number for trial in search.complete],
        on_axis(values, floor, top),
        s=size,
        color=BLUE,
        label="complete",
        zorder=3,
    )
    if last:
        axes.scatter(
            [number for number, _ in last],
            on_axis([value for _, value in last], floor, top),
            s=size,
            color=GREY,
            marker="x",
            linewidths=1.2,
            label="pruned (last value)",
        )
    failed = [t.number for t in search.finished if t.state == TrialState.FAIL]
    if failed:
        axes.plot(
            failed,
            [0.985] * len(failed),
            "|",
            color=DARK,
            markersize=7,
            transform=axes.get_xaxis_transform(),
            label="failed (no value)",
        )
    numbers = [trial.number for trial in search.complete]
    numbers.append(max(trial.number for trial in search.finished))
    so_far = np.maximum.accumulate([*values, values[-1]])
    axes.step(numbers, so_far, where="post", color=VERMILLION, linewidth=1.8, label="best so far")
    axes.scatter([search.best.number], [max(values)], s=130, marker="*", color=VERMILLION, zorder=4)
    limit_values(axes, floor, top)
    mark_below(axes, [*values, *(value for _, value in last)], floor)
    whole_numbers(axes)
    axes.set_title(f"Best: trial {search.best.number} with {max(values):.2f} %")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def _learning_curves(search: Search) -> Figure:
    """Draw all trials' values by epoch: all of them, and what happens near the top."""
    search.require(1)
    curves = [(trial, *_percents(trial)) for trial in search.finished]
    curves = [curve for curve in curves if len(curve[1]) >= 2]
    if not curves:
        raise TooLittleError("needs a trial of 2 epochs")
    figure = empty_figure(12, 4.8)
    whole, near = figure.subplots(1, 2)
    many = len(curves) > 40
    best = search.best.number
    named = set()
    for axes in (whole, near):
        for trial, epochs, percents in sorted(curves, key=lambda curve: curve[0].number == best):
            kind, style = _curve_style(trial, best, many)
            label = None if kind in named else kind
            named.add(kind)
            axes.plot(epochs, percents, label=label, **style)
            if trial.number != best and trial.state != TrialState.COMPLETE:
                axes.plot(epochs[-1], percents[-1], "x", color=style["color"], markersize=4)
        whole_numbers(axes, "Epoch")
        axes.set_ylabel(ACCURACY)
    ends = [max(percents) for trial, _, percents in curves if trial.state == TrialState.COMPLETE]
    ends = ends or [max(percents) for _, _, percents in curves]
    top, middle = max(ends), float(np.median(ends))
    lowest = top - max(2.0, 4 * (top - middle))
    near.set_ylim(lowest, top + 0.05 * (top - lowest))
    whole.set_title(f"{len(curves)} trials")
    near.set_title("The same, near the top")
    legend = figure.legend(loc="outside lower center", ncols=4)
    for line in legend.get_lines():
        line.set(alpha=1.0, linewidth=2.0)
    return figure


def _curve_style(trial: FrozenTrial, best: int, many: bool) -> tuple[str, dict[str, Any]]:
    width, alpha = (0.7, 0.35) if many else (1.1, 0.7)
    if trial.number == best:
        return f"best (trial {best})", {"color": VERMILLION, "linewidth": 2.4, "zorder": 5}
    if trial.state == TrialState.COMPLETE:
        return "complete", {"color": BLUE, "linewidth": width, "alpha": alpha}
    return "pruned or failed", {"color": GREY, "linewidth": width, "alpha": min(1, 2 * alpha)}


def _durations(search: Search) -> Figure:
    """Draw how long each trial took."""
    timed = [trial for trial in search.finished if trial.duration is not None]
    if len(timed) < 2:
        raise TooLittleError(f"needs 2 finished trials, there are {len(timed)}")
    seconds = {t.number: t.duration.total_seconds() for t in timed if t.duration is not None}
    unit, per_unit = _time_unit(max(seconds.values()))
    figure = empty_figure(9, 4.4)
    axes = figure.subplots()
    for state, kind, colour in (
        (TrialState.COMPLETE, "complete", BLUE),
        (TrialState.PRUNED, "pruned", "#b5b5b5"),
        (TrialState.FAIL, "failed", DARK),
    ):
        numbers = [trial.number for trial in timed if trial.state == state]
        if numbers:
            heights = [seconds[number] / per_unit for number in numbers]
            width = 0.8 if len(timed) <= 100 else 1.0
            axes.bar(numbers, heights, width=width, color=colour, label=kind)
    whole = [seconds[trial.number] / per_unit for trial in timed if trial in search.complete]
    if whole:
        median = float(np.median(whole))
        axes.axhline(
            median, color=VERMILLION, linestyle="--", label=f"median of complete: {median:.3g}"
        )
    axes.grid(axis="x", visible=False)
    axes.set_ylabel(f"Duration ({unit})")
    hours = sum(seconds.values()) / 3600
    total = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
    axes.set_title(f"{len(timed)} trials, {total} in all")
    whole_numbers(axes)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def _time_unit(seconds: float) -> tuple[str, float]:
    for unit, per_unit in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * per_unit:
            return unit, per_unit
    return "seconds", 1.0


# --------------------------------------------------------------------------------- hyperparameters


def _searched(search: Search) -> dict[str, BaseDistribution]:
    """Give the hyperparameters that complete trials differ in, with their distributions."""
    distributions: dict[str, BaseDistribution] = {}
    for trial in search.complete:
        distributions |= trial.distributions
    found = {
        name: distribution
        for name, distribution in sorted(distributions.items())
        if len({t.params[name] for t in search.complete if name in t.params}) > 1
    }
    if not found:
        raise TooLittleError("needs trials that differ in a hyperparameter")
    return found


def _is_log(distribution: BaseDistribution) -> bool:
    return bool(getattr(distribution, "log", False))


def _importances(search: Search) -> Figure:
    """Draw how much each hyperparameter decides whether a trial is among the best (PED-ANOVA)."""
    search.require(TRIALS_FOR_IMPORTANCES)
    _searched(search)
    count = len(search.complete)
    quantile = max(0.1, TOP_TRIALS / count)
    evaluator = PedAnovaImportanceEvaluator(target_quantile=quantile)
    study = optuna.create_study(direction=StudyDirection.MAXIMIZE)
    study.add_trials(search.complete)
    shares = get_param_importances(study, evaluator=evaluator)
    known = sorted((100 * share, name) for name, share in shares.items() if math.isfinite(share))
    if not known:
        raise TooLittleError("the trials tell hyperparameters' importances not apart")
    figure = empty_figure(9, 1.3 + 0.34 * len(known))
    axes = figure.subplots()
    bars = axes.barh([name for _, name in known], [share for share, _ in known], color=BLUE)
    axes.bar_label(bars, fmt="%.0f %%", padding=3)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.1)
    axes.set_xlabel("Share of the importance (%)")
    top = round(100 * quantile)
    axes.set_title(f"What sets the best {top} % of {count} trials apart (PED-ANOVA)")
    return figure


def _slices(search: Search) -> Figure:
    """Draw the value over each hyperparameter by itself."""
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    search.require(TRIALS_FOR_COMPARISONS)
    searched = _searched(search)
    columns = min(len(searched), 3 if len(searched) <= 9 else 4)
    rows = math.ceil(len(searched) / columns)
    figure = empty_figure(max(3.6 * columns, 6), 3.0 * rows + 0.3)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    values = [_value(trial) for trial in search.complete]
    floor, top = lowest_shown(values), max(values)
    colours = Normalize(0, max(trial.number for trial in search.complete))
    for index, (axes, (name, distribution)) in enumerate(
        zip(panels, searched.items(), strict=False)
    ):
        trials = [trial for trial in search.complete if name in trial.params]
        dots = axes.scatter(
            _positions(axes, name, distribution, trials),
            on_axis([_value(trial) for trial in trials], floor, top),
            c=[trial.number for trial in trials],
            norm=colours,
            cmap="cividis",
            s=40 if len(trials) <= 60 else 12,
            edgecolors="white",
            linewidths=0.3,
        )
        if search.best in trials:
            at = _positions(axes, name, distribution, [search.best])
            axes.scatter(at, [top], s=150, marker="*", color=VERMILLION, zorder=4)
        limit_values(axes, floor, top)
        if _is_log(distribution):
            label_log_axis(axes)
        axes.set_xlabel(short_name(name, 30) + (" (log scale)" if _is_log(distribution) else ""))
        if index % columns:
            axes.set_ylabel("")
    for axes in panels[len(searched) :]:
        axes.set_visible(False)
    bar = figure.colorbar(
        dots,
        ax=panels,
        label="Trial",
        ticks=MaxNLocator(integer=True),
        aspect=30,
        fraction=0.04,
        pad=0.01,
    )
    bar.outline.set_linewidth(0)
    below = sum(value < floor for value in values)
    note = f"; {below} below the axis, at its edge" if below else ""
    figure.suptitle(
        f"{len(values)} complete trials; star: the best, trial {search.best.number}{note}",
        fontsize=11,
    )
    return figure


def _positions(
    axes: Axes, name: str, distribution: BaseDistribution, trials: Sequence[FrozenTrial]
) -> list[float]:
    """Place trials along the x axis by a hyperparameter, and set that axis up."""
    if not isinstance(distribution, CategoricalDistribution):
        return [float(trial.params[name]) for trial in trials]
    choices = list(distribution.choices)
    names = [short_name(choice, 18) for choice in choices]
    crowded = sum(len(choice) for choice in names) > 30
    axes.set_xticks(range(len(choices)), names, rotation=20 if crowded else 0)
    axes.set_xlim(-0.5, len(choices) - 0.5)
    axes.grid(axis="x", visible=False)
    # Spread by the trial's number, always the same way, so that equal values stay visible.
    return [choices.index(t.params[name]) + 0.3 * (t.number * 0.618 % 1 - 0.5) for t in trials]


def _parallel_coordinates(search: Search) -> Figure:
    """Draw each complete trial as a line through its hyperparameters, coloured by its value."""
    import matplotlib as mpl
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    search.require(TRIALS_FOR_COMPARISONS)
    searched = _searched(search)
    values = [_value(trial) for trial in search.complete]
    floor, top = lowest_shown(values), max(values)
    scale = Normalize(floor, max(top, floor + 0.1))
    figure = empty_figure(max(6.0, 1.25 * len(searched) + 2.5), 5.2)
    axes = figure.subplots()
    many = len(values) > 60
    for trial in sorted(search.complete, key=lambda t: (t is search.best, _value(t))):
        best = trial is search.best
        axes.plot(
            [
                _height(distribution, trial.params.get(name))
                for name, distribution in searched.items()
            ],
            color=VERMILLION if best else mpl.colormaps["viridis"](scale(_value(trial))),
            linewidth=2.6 if best else 0.8 if many else 1.4,
            alpha=1.0 if best else 0.5 if many else 0.8,
            label=f"best (trial {trial.number})" if best else None,
        )
    unused = any(name not in trial.params for trial in search.complete for name in searched)
    for x, distribution in enumerate(searched.values()):
        _scale_at(axes, x, distribution)
    if unused:
        axes.axhline(UNUSED, color=PALE, linewidth=0.8, zorder=0)
        axes.text(-0.3, UNUSED, "not\nused", ha="right", va="center", fontsize=8, color=GREY)
    axes.set_xlim(-0.5, len(searched) - 0.4)
    axes.set_ylim(UNUSED - 0.06 if unused else -0.06, 1.06)
    names = [textwrap.fill(short_name(name, 30).replace("_", " "), 12) for name in searched]
    axes.set_xticks(range(len(searched)), names, fontsize=9)
    axes.tick_params(length=0)
    axes.yaxis.set_visible(False)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    extend = "min" if min(values) < floor else "neither"
    bar = figure.colorbar(ScalarMappable(scale, "viridis"), ax=axes, extend=extend, pad=0.01)
    bar.set_label(ACCURACY)
    axes.set_title(f"{len(values)} complete trials")
    figure.legend(loc="outside lower center")
    return figure


UNUSED = -0.16  # where a line passes a hyperparameter that its trial does not have


def _height(distribution: BaseDistribution, value: Any) -> float:
    """Place a hyperparameter's value between 0 and 1."""
    if value is None:
        return UNUSED
    if isinstance(distribution, CategoricalDistribution):
        last = max(1, len(distribution.choices) - 1)
        return distribution.choices.index(value) / last
    low, high = _ends(distribution)
    if _is_log(distribution):
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low) if high > low else 0.5


def _ends(distribution: BaseDistribution) -> tuple[float, float]:
    return float(getattr(distribution, "low", 0.0)), float(getattr(distribution, "high", 1.0))


def _scale_at(axes: Axes, x: int, distribution: BaseDistribution) -> None:
    """Draw the vertical axis of one hyperparameter, with some of its values beside it."""
    axes.plot([x, x], [0, 1], color=GREY, linewidth=0.9, zorder=0)
    if isinstance(distribution, CategoricalDistribution):
        ticks: list[Any] = list(distribution.choices)
    else:
        low, high = _ends(distribution)
        middle = math.sqrt(low * high) if _is_log(distribution) else (low + high) / 2
        ticks = [low, middle, high]
    for value in ticks:
        shown = f"{value:.2g}" if isinstance(value, float) else short_name(shown_value(value), 12)
        axes.annotate(
            shown,
            (x, _height(distribution, value)),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            zorder=10,
            bbox={"boxstyle": "round,pad=0.15", "color": "white", "alpha": 0.8, "linewidth": 0},
        )


# ----------------------------------------------------------------------------------------- writers


def _best_metrics(search: Search) -> tuple[int, dict[str, Any]]:
    """Read the metrics of the best trial's best epoch."""
    search.require(1)
    home = home_of(search.best.user_attrs, search.checkpoint_dir)
    path = trial_dir(home, search.best.number) / "metrics.json"
    try:
        return search.best.number, dict(read_json(path)["best"])
    except (OSError, ValueError, KeyError, TypeError):
        where = f"{path.parent.name}/{path.name}"
        raise TooLittleError(f"the best trial's {where} cannot be read") from None


def _writers(search: Search) -> Figure:
    return writers_picture(*_best_metrics(search))


def _confusion(search: Search) -> Figure:
    return confusion_picture(*_best_metrics(search))


# --------------------------------------------------------------------------------- one trial's own


def _curves(directory: Path) -> Figure:
    """Draw losses, validation accuracy and learning rate of one trial by epoch."""
    history = read_history(directory)
    if len(history) < 2:
        raise TooLittleError(f"needs 2 epochs, there are {len(history)}")
    figure = empty_figure(12, 3.6)
    losses, accuracy, rate = figure.subplots(1, 3)
    epochs = [row["epoch"] for row in history]
    losses.plot(epochs, _column(history, "train_loss"), color=BLUE, label="training")
    if any("loss" in row for row in history):
        validation = _column(history, "loss")
        losses.plot(epochs, validation, color=VERMILLION, linestyle="--", label="validation")
    losses.set_ylabel("Loss")
    losses.set_ylim(bottom=0)
    losses.legend()
    percents = [100 * value for value in _column(history, "macro_top1")]
    accuracy.plot(epochs, percents, color=BLUE)
    accuracy.set_ylabel(ACCURACY)
    if np.isfinite(percents).any():
        measured = np.flatnonzero(np.isfinite(percents))
        best = max(measured, key=lambda at: (percents[at], -history[at].get("loss", 0.0)))
        accuracy.scatter([epochs[best]], [percents[best]], s=120, marker="*", color=VERMILLION)
        accuracy.set_title(f"Best: {percents[best]:.2f} % at epoch {epochs[best]}")
    rate.plot(epochs, _column(history, "learning_rate"), color=GREEN)
    rate.set_ylabel("Learning rate (at the epoch's end)")
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", scilimits=(-2, 3))
    losses.set_title(f"{short_name(directory.name)}: {len(history)} epochs")
    for axes in (losses, accuracy, rate):
        whole_numbers(axes, "Epoch")
    return figure


def _column(history: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [float(row.get(name, math.nan)) for row in history]


PICTURES: Mapping[str, Draw] = {
    "history.png": _history,
    "learning_curves.png": _learning_curves,
    "importances.png": _importances,
    "parallel_coordinates.png": _parallel_coordinates,
    "slices.png": _slices,
    "durations.png": _durations,
    "confusion.png": _confusion,
    "writers.png": _writers,
}
