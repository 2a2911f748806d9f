"""Draws a search for people: pictures in summary/, and each trial's own curves.

Needs matplotlib, which is imported when the first picture is drawn, without pyplot or a display.
All pictures are drawn here rather than by Optuna's figures: values in percent, pruned and failed
trials marked, the best trial in one colour throughout, legible with 300 trials.
"""

from __future__ import annotations

import logging
import math
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from files import UserError, one_line, read_json, write_whole
from study import open_study
from summary import DATABASE, read_history, shown_value, trial_dir

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Draw = Callable[["Search"], Figure]

NO_MATPLOTLIB = "no pictures: matplotlib is not installed (pip install matplotlib)"
ACCURACY = "Validation macro top-1 (%)"
TRIALS_FOR_IMPORTANCES = 10  # with fewer, PED-ANOVA tells chance
TRIALS_FOR_COMPARISONS = 3
TOP_TRIALS = 5  # that PED-ANOVA's best group should hold at least, says its documentation
NAMED_WRITERS = 60  # more names than this cannot be read beside each other
WORST_WRITERS = 40

# Okabe and Ito's palette: told apart with any colour vision.
BLUE, SKY, VERMILLION, GREEN = "#0072B2", "#56B4E9", "#D55E00", "#009E73"
GREY, DARK, PALE = "#8a8a8a", "#222222", "#d9d9d9"

STYLE: Any = {
    "figure.dpi": 120,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "legend.fontsize": 9,
}


class TooLittleError(Exception):
    """There is too little to draw a picture from; says what is missing."""


@dataclass(frozen=True)
class Search:
    """What the pictures are drawn from: a study, its finished trials, its directory."""

    checkpoint_dir: Path
    study: optuna.Study
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


def draw_all(checkpoint_dir: Path, study: optuna.Study | None = None) -> list[str]:
    """Draw the pictures of a search into summary/, each file whole.

    study: the open one; without it the database in checkpoint_dir is opened.
    Returns a line for each picture that was not drawn, saying why, and removes an older one of the
    same name, which would show another state. Without matplotlib the only line says that. A picture
    that fails does not stop the others. Raises UserError when there is no study to draw.
    """
    if not _matplotlib_is_there():
        return [NO_MATPLOTLIB]
    if study is None:
        study = _open(checkpoint_dir)
    finished = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
    search = Search(checkpoint_dir, study, finished)
    directory = checkpoint_dir / "summary"
    directory.mkdir(exist_ok=True)
    missing = []
    for name, draw in PICTURES.items():
        reason = _try_to_draw(directory / name, partial(draw, search))
        if reason is not None:
            missing.append(f"{name}: {reason}")
    return missing


def draw_curves(directory: Path) -> str | None:
    """Draw a trial's history.jsonl into its curves.png; return why it was not drawn, if so."""
    if not _matplotlib_is_there():
        return NO_MATPLOTLIB
    reason = _try_to_draw(directory / "curves.png", lambda: _curves(directory))
    return None if reason is None else f"{directory.name}/curves.png: {reason}"


def _open(checkpoint_dir: Path) -> optuna.Study:
    if not (checkpoint_dir / DATABASE).exists():
        raise UserError(f"{checkpoint_dir} holds no search ({DATABASE} is not there)")
    return open_study(checkpoint_dir)


def _matplotlib_is_there() -> bool:
    try:
        with _quiet():
            import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def _try_to_draw(path: Path, draw: Callable[[], Figure]) -> str | None:
    """Draw one picture; return why there is none, if so."""
    import matplotlib as mpl

    try:
        with _quiet(), mpl.rc_context():
            mpl.rcdefaults()  # whatever a user's matplotlibrc says, LaTeX for all text included
            mpl.rcParams.update(STYLE)
            _save(draw(), path)
        return None
    except TooLittleError as reason:
        told = str(reason)
    except Exception as error:  # a picture is never worth a finished search
        told = f"could not be drawn: {one_line(repr(error))}"
    path.unlink(missing_ok=True)
    return told


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep warnings of Optuna (experimental) and matplotlib (fonts, layout) from the terminal."""
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _save(figure: Figure, path: Path) -> None:
    write_whole(path, lambda file: figure.savefig(file, format="png"))


def _figure(width: float, height: float) -> Figure:
    """Make an empty figure, in inches; it belongs to no pyplot, so nothing has to be closed."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _value(trial: FrozenTrial) -> float:
    """Give the value of a complete trial in percent."""
    return 100 * float(trial.value or 0.0)


def _percents(trial: FrozenTrial) -> tuple[list[int], list[float]]:
    """Give a trial's epochs and its values there in percent, finite ones only."""
    known = [(e, 100 * v) for e, v in sorted(trial.intermediate_values.items()) if math.isfinite(v)]
    return [epoch for epoch, _ in known], [value for _, value in known]


def _label(name: object, limit: int = 24) -> str:
    """Make any name a short plain label: one line, its middle left out, `$` not mathematics."""
    text = one_line(name, 10**6)
    if len(text) > limit:
        head = limit // 2
        text = f"{text[:head]}…{text[len(text) - (limit - head - 1) :]}"
    return text.replace("$", r"\$")


def _whole_numbers(axes: Axes, name: str = "Trial") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


# ------------------------------------------------------------------------------- values on an axis


def _floor(values: Sequence[float]) -> float:
    """Choose the lowest value shown, so that a few poor trials do not flatten all others."""
    top = max(values)
    spread = max(top - float(np.percentile(values, 25)), 1.0)
    return max(min(values), top - 4 * spread)


def _limit_values(axes: Axes, floor: float, top: float) -> None:
    margin = 0.06 * max(top - floor, 1.0)
    axes.set_ylim(floor - margin, top + margin)
    axes.set_ylabel(ACCURACY)


def _shown(values: Sequence[float], floor: float, top: float) -> list[float]:
    """Move what lies below the axis onto its lower edge."""
    edge = floor - 0.03 * max(top - floor, 1.0)
    return [value if value >= floor else edge for value in values]


def _mark_below(axes: Axes, values: Sequence[float], floor: float) -> None:
    below = sum(value < floor for value in values)
    if below:
        axes.text(
            0.99,
            0.01,
            f"{below} below the axis, drawn at its edge",
            transform=axes.transAxes,
            ha="right",
            va="bottom",
            fontsize=8,
            color=GREY,
        )


def _history(search: Search) -> Figure:
    """Draw the value of each trial, and the best so far."""
    search.require(2)
    figure = _figure(9, 4.8)
    axes = figure.subplots()
    values = [_value(trial) for trial in search.complete]
    pruned = [(t.number, _percents(t)[1]) for t in search.finished if t.state == TrialState.PRUNED]
    last = [(number, percents[-1]) for number, percents in pruned if percents]
    floor, top = _floor(values), max([*values, *(value for _, value in last)])
    size = 34 if len(search.finished) <= 60 else 14
    axes.scatter(
        [trial.number for trial in search.complete],
        _shown(values, floor, top),
        s=size,
        color=BLUE,
        label="complete",
        zorder=3,
    )
    if last:
        axes.scatter(
            [number for number, _ in last],
            _shown([value for _, value in last], floor, top),
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
    _limit_values(axes, floor, top)
    _mark_below(axes, [*values, *(value for _, value in last)], floor)
    _whole_numbers(axes)
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
    figure = _figure(12, 4.8)
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
        _whole_numbers(axes, "Epoch")
        axes.set_ylabel(ACCURACY)
    ends = [max(percents) for trial, _, percents in curves if trial.state == TrialState.COMPLETE]
    ends = ends or [max(percents) for _, _, percents in curves]
    top, middle = max(ends), float(np.median(ends))
    lowest = top - max(2.0, 4 * (top - middle))
    near.set_ylim(lowest, top + 0.05 * (top - lowest))
    whole.set_title(f"{len(curves)} trials")
    near.set_title("The same, near the top")
    figure.legend(loc="outside lower center", ncols=4)
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
    figure = _figure(9, 4.4)
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
    _whole_numbers(axes)
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
    shares = get_param_importances(search.study, evaluator=evaluator)
    known = sorted((100 * share, name) for name, share in shares.items() if math.isfinite(share))
    if not known:
        raise TooLittleError("the trials tell hyperparameters' importances not apart")
    figure = _figure(9, 1.3 + 0.34 * len(known))
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

    search.require(TRIALS_FOR_COMPARISONS)
    searched = _searched(search)
    columns = min(len(searched), 3 if len(searched) <= 9 else 4)
    rows = math.ceil(len(searched) / columns)
    figure = _figure(max(3.6 * columns, 6), 3.0 * rows + 0.3)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    values = [_value(trial) for trial in search.complete]
    floor, top = _floor(values), max(values)
    colours = Normalize(0, max(trial.number for trial in search.complete))
    for index, (axes, (name, distribution)) in enumerate(
        zip(panels, searched.items(), strict=False)
    ):
        trials = [trial for trial in search.complete if name in trial.params]
        dots = axes.scatter(
            _positions(axes, name, distribution, trials),
            _shown([_value(trial) for trial in trials], floor, top),
            c=[trial.number for trial in trials],
            norm=colours,
            cmap="cividis",
            s=26 if len(trials) <= 60 else 12,
            edgecolors="white",
            linewidths=0.3,
        )
        if search.best in trials:
            at = _positions(axes, name, distribution, [search.best])
            axes.scatter(at, [top], s=150, marker="*", color=VERMILLION, zorder=4)
        _limit_values(axes, floor, top)
        axes.set_xlabel(_label(name, 30) + (" (log scale)" if _is_log(distribution) else ""))
        if index % columns:
            axes.set_ylabel("")
    for axes in panels[len(searched) :]:
        axes.set_visible(False)
    bar = figure.colorbar(dots, ax=panels, label="Trial", aspect=30, fraction=0.04, pad=0.01)
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
        if _is_log(distribution):
            axes.set_xscale("log")
        return [float(trial.params[name]) for trial in trials]
    choices = list(distribution.choices)
    names = [_label(choice, 18) for choice in choices]
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
    floor, top = _floor(values), max(values)
    scale = Normalize(floor, max(top, floor + 0.1))
    figure = _figure(max(6.0, 1.25 * len(searched) + 2.5), 5.2)
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
    names = [textwrap.fill(_label(name, 30).replace("_", " "), 12) for name in searched]
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
        shown = f"{value:.2g}" if isinstance(value, float) else _label(shown_value(value), 12)
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


def _best_metrics(search: Search) -> tuple[FrozenTrial, dict[str, Any]]:
    """Read the metrics of the best trial's best epoch."""
    search.require(1)
    path = trial_dir(search.checkpoint_dir, search.best.number) / "metrics.json"
    try:
        return search.best, dict(read_json(path)["best"])
    except (OSError, ValueError, KeyError, TypeError):
        where = f"{path.parent.name}/{path.name}"
        raise TooLittleError(f"the best trial's {where} cannot be read") from None


def _writers(search: Search) -> Figure:
    """Draw the best trial's accuracy for each writer, the worst first."""
    trial, metrics = _best_metrics(search)
    shares: dict[str, float] = metrics.get("per_writer") or {}
    if not shares:
        raise TooLittleError(f"trial {trial.number} has recorded no writers")
    lines = _lines_of_writers(metrics)
    ordered = sorted((100 * share, name) for name, share in shares.items())
    many = len(ordered) > NAMED_WRITERS
    named = ordered[:WORST_WRITERS] if many else ordered
    figure = _figure(11 if many else 9, max(3.0, 1.4 + 0.19 * len(named)))
    panels = figure.subplots(1, 2 if many else 1, squeeze=False).ravel()
    axes = panels[0]
    positions = range(len(named), 0, -1)
    axes.barh(positions, [percent for percent, _ in named], color=BLUE, height=0.75)
    axes.set_yticks(positions, [_label(name) for _, name in named], fontsize=8)
    for position, (percent, name) in zip(positions, named, strict=True):
        of = f" of {lines[name]}" if name in lines else ""
        axes.text(percent + 1, position, f"{percent:.1f} %{of}", va="center", fontsize=8)
    mean = float(np.mean([percent for percent, _ in ordered]))
    axes.axvline(mean, color=VERMILLION, linestyle="--", label=f"mean of writers: {mean:.2f} %")
    axes.set_xlim(0, 122 if lines else 114)
    axes.set_xticks(range(0, 101, 20))
    axes.set_ylim(0.3, len(named) + 0.7)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("Validation lines recognised (%)" + (" of lines" if lines else ""))
    worst = f"the {len(named)} worst of {len(ordered)}" if many else f"{len(ordered)}"
    axes.set_title(f"Trial {trial.number}: {worst} writers")
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
    recorded = metrics.get("confusion")
    if not recorded:
        raise TooLittleError("the best trial has recorded no confusion matrix")
    try:
        names, counts = list(recorded["writers"]), np.asarray(recorded["counts"], dtype=float)
    except (KeyError, TypeError, ValueError):
        raise TooLittleError("the best trial's confusion matrix cannot be read") from None
    if counts.shape != (len(names), len(names)) or len(names) < 2:
        raise TooLittleError("the best trial's confusion matrix cannot be read")
    return names, counts


def _confusion(search: Search) -> Figure:
    """Draw whom the best trial takes for whom, and list the commonest mistakes."""
    from matplotlib.colors import PowerNorm

    trial, metrics = _best_metrics(search)
    names, counts = _confusion_of(metrics)
    size = len(names)
    side = min(9.5, max(4.5, 1.5 + 0.3 * size))
    figure = _figure(side + 4.6, side + 0.3)
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
    labels = [_label(names[i], 20) for i in ticks]
    axes.set_xticks(ticks, labels, rotation=90, fontsize=font)
    axes.set_yticks(ticks, labels, fontsize=font)
    axes.grid(visible=False)
    axes.set_xlabel("Taken for")
    axes.set_ylabel("True writer")
    axes.set_title(f"Trial {trial.number}: {int(counts.sum())} validation lines of {size} writers")
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
        lines.append(f"{_label(names[true], 20)}\n    as {_label(names[guessed], 20)}: {of}")
    return "\n".join(lines)


# --------------------------------------------------------------------------------- one trial's own


def _curves(directory: Path) -> Figure:
    """Draw losses, validation accuracy and learning rate of one trial by epoch."""
    history = read_history(directory)
    if len(history) < 2:
        raise TooLittleError(f"needs 2 epochs, there are {len(history)}")
    figure = _figure(12, 3.6)
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
        best = int(np.nanargmax(percents))
        accuracy.scatter([epochs[best]], [percents[best]], s=120, marker="*", color=VERMILLION)
        accuracy.set_title(f"Best: {percents[best]:.2f} % at epoch {epochs[best]}")
    rate.plot(epochs, _column(history, "learning_rate"), color=GREEN)
    rate.set_ylabel("Learning rate (at the epoch's end)")
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", scilimits=(-2, 3))
    losses.set_title(f"{_label(directory.name)}: {len(history)} epochs")
    for axes in (losses, accuracy, rate):
        _whole_numbers(axes, "Epoch")
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
