"""The charts of a search: its history, learning curves, and the value over each hyperparameter.

The best trial is in the accent's colour, all else in grey. What lies below an axis stands at its
edge, and the text beneath says how much that is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from writer_search.common.text import percent, shown_value
from writer_search.results.pictures.axes import Axes, log_ticks, nice_ticks, numbers, short

ENOUGH_FOR_HYPERPARAMETERS = 3  # complete trials
VALUE = "validation macro top-1, %"


@dataclass(frozen=True)
class Outcome:
    """A trial to be drawn. value: of a complete one, in percent; values: by epoch, in percent."""

    number: int
    state: str
    value: float | None
    values: Sequence[float]
    params: Mapping[str, Any]


@dataclass(frozen=True)
class Chart:
    """A finished chart: its name as a file, title, how to read it, SVG."""

    name: str
    title: str
    caption: str
    panels: Sequence[str]


def lowest_shown(values: Sequence[float]) -> float:
    """Choose the lowest value shown, so that a few poor trials do not flatten all others."""
    top, order = max(values), sorted(values)
    spread = max(top - order[len(order) // 4], 1.0)
    return max(order[0], top - 2.5 * spread)


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Give the ends of an axis of percentages: none lies beyond 0 or 100.

    They are half a point from the values, or more: a smaller difference is no difference.
    """
    floor, top = lowest_shown(values), max(values)
    margin = max(0.08 * (top - floor), 0.5)
    return max(0.0, floor - margin), min(100.0, top + margin)


def best_of(trials: Sequence[Outcome]) -> Outcome:
    """Give the complete trial with the highest value, the earliest of equals."""
    complete = [trial for trial in trials if trial.value is not None]
    return max(complete, key=lambda trial: (trial.value, -trial.number))


def below(values: Sequence[float], floor: float) -> str:
    number = sum(value < floor for value in values)
    return f" {number} below the axis, at its edge." if number else ""


def history(trials: Sequence[Outcome], error: float, chance: float | None) -> Chart | None:
    """Draw the value of each trial and the best so far; None with fewer than two complete ones.

    error: the best value's standard error, chance: what guessing reaches; both in percent.
    """
    complete = [(trial.number, trial.value) for trial in trials if trial.value is not None]
    if len(complete) < 2:
        return None
    best = best_of(trials)
    top = best.value or 0.0
    pruned = [t for t in trials if t.state == "pruned" and t.values]
    values = [value for _, value in complete] + [trial.values[-1] for trial in pruned]
    low, high = limits(values)
    high = min(100.0, max(high, top + error))
    first, last = trials[0].number, max(trial.number for trial in trials)
    axes = Axes((first - 0.5, last + 0.5), (low, high), top=26)
    axes.frame("trial", VALUE, numbers(first, last))
    if error:
        axes.band(top - error, min(100.0, top + error))
    if chance is not None:
        axes.across(chance, "x")
    size = 4.0 if len(trials) <= 100 else 2.2
    for trial in pruned:
        title = f"trial {trial.number}, pruned at {trial.values[-1]:.2f} %"
        axes.cross(trial.number, trial.values[-1], size * 0.8, title)
    for number, value in complete:
        axes.dot(number, value, "d", size, f"trial {number}, {value:.2f} %")
    lost = [trial for trial in trials if trial.state in ("failed", "interrupted")]
    for trial in lost:
        axes.tick(trial.number, f"trial {trial.number}, {trial.state}")
    steps, so_far = [], -math.inf
    for number, value in [*complete, (last, -math.inf)]:
        steps += [(float(number), so_far)] if so_far > -math.inf else []
        so_far = max(so_far, value)
        steps.append((float(number), so_far))
    axes.line(steps, "b", 1.6)
    axes.dot(best.number, top, "a", size + 2, f"trial {best.number}, the best, {top:.2f} %")
    caption = (
        f"Dots: complete trials; line: the best so far; large dot: trial {best.number}, {top:.2f} %"
        + (f" ± {error:.2f} (standard error, shaded)." if error else ".")
    )
    caption += f" Crosses: {len(pruned)} pruned, at their last value." if pruned else ""
    caption += f" Ticks above: {len(lost)} failed or interrupted." if lost else ""
    caption += f" Guessing reaches {chance:.1f} %." if chance is not None else ""
    caption += below(values, low)
    return Chart(
        "history", "Value of each trial", caption, [axes.svg(f"Value by trial. {caption}")]
    )


def learning_curves(trials: Sequence[Outcome], chance: float | None) -> Chart | None:
    """Draw all trials by epoch, and once more what happens near the top."""
    curves = [trial for trial in trials if len(trial.values) >= 2]
    if not curves:
        return None
    complete = [trial for trial in trials if trial.value is not None]
    best = best_of(trials).number if complete else None
    peaks = [max(trial.values) for trial in curves]
    every = [value for trial in curves for value in trial.values]
    bounds = [(min(every), max(every)), limits(peaks)]
    if bounds[1][1] - bounds[1][0] > 0.35 * (bounds[0][1] - bounds[0][0]):
        bounds = bounds[:1]  # nearly the same
    caption = f"{len(curves)} trials" + (
        f"; in colour: trial {best}, the best" * (best is not None)
    )
    caption += "."
    caption += " Crosses end what was pruned or failed." * any(t.value is None for t in curves)
    caption += " The second chart shows the same near the top." * (len(bounds) > 1)
    panels = []
    for number, (low, high) in enumerate(bounds):
        axes = Axes((1.0, max(len(trial.values) for trial in curves)), (low, high), top=26)
        axes.frame("epoch", VALUE, numbers(*axes.x))
        if chance is not None:
            axes.across(chance, "x")
        for trial in sorted(curves, key=lambda trial: trial.number == best):
            _curve(axes, trial, trial.number == best, len(curves) > 40)
        panels.append(axes.svg(f"Value by epoch{', near the top' * number}. {caption}"))
    return Chart("learning_curves", "Learning curves", caption, panels)


def _curve(axes: Axes, trial: Outcome, is_best: bool, many: bool) -> None:
    end = percent(trial.value / 100) if trial.value is not None else trial.state.lower()
    if max(trial.values) < axes.y[0]:
        return
    points = list(enumerate(trial.values, 1))
    first = next((i for i, (_, value) in enumerate(points) if value >= axes.y[0]), len(points) - 1)
    points = points[max(0, first - 1) :]  # what lies below the axis is not drawn along its edge
    title = f"trial {trial.number}, {end}"
    kind = "b" if is_best else "l f" if many else "l"
    axes.line(points, kind, 2.6 if is_best else 0.7 if many else 1.2, title)
    if trial.value is None and points[-1][1] >= axes.y[0]:
        axes.cross(points[-1][0], points[-1][1], 3, title)


def hyperparameters(trials: Sequence[Outcome], space: Mapping[str, Any]) -> Chart | None:
    """Draw the value over each hyperparameter that trials differ in, the best fifth in colour."""
    complete = [trial for trial in trials if trial.value is not None]
    searched = {
        name: rule
        for name, rule in space.items()
        if isinstance(rule, dict)
        and _differ([t.params[name] for t in complete if name in t.params])
    }
    if not searched:
        return None
    order = sorted(complete, key=lambda trial: (trial.value or 0.0, -trial.number))
    top = order[-max(1, len(order) // 5) :]
    values = [trial.value or 0.0 for trial in complete]
    best = f"the best {len(top)}" if len(top) > 1 else "the best"
    caption = (
        f"{len(complete)} complete trials, {best} in colour: where the best lie close "
        f"together, the hyperparameter matters.{below(values, limits(values)[0])}"
    )
    numbers_of_top = {trial.number for trial in top}
    panels = []
    for name, rule in searched.items():
        here = [trial for trial in order if name in trial.params]
        choices = _choices(rule, name, here)
        axes = _hyperparameter_axes(name, rule, choices, here, limits(values))
        for trial in here:
            x, value = _place(choices, trial, name), trial.value or 0.0
            title = f"trial {trial.number}: {shown_value(trial.params[name])}, {value:.2f} %"
            kind = "a" if trial.number in numbers_of_top else "d"
            axes.dot(x, value, kind, 3.4 if len(here) <= 60 else 2.2, title)
        panels.append(axes.svg(f"Value over {name}"))
    return Chart("hyperparameters", "Value over each hyperparameter", caption, panels)


def _differ(values: Sequence[Any]) -> bool:
    return len(values) >= ENOUGH_FOR_HYPERPARAMETERS and len(set(map(str, values))) > 1


def _choices(rule: Mapping[str, Any], name: str, trials: Sequence[Outcome]) -> list[Any] | None:
    """Give what a hyperparameter is chosen from, values that were given by hand included."""
    found = rule.get("choices")
    if not isinstance(found, list):
        return None
    return list(dict.fromkeys([*found, *(trial.params[name] for trial in trials)]))


def _place(choices: list[Any] | None, trial: Outcome, name: str) -> float:
    value = trial.params[name]
    if choices is None:
        return float(value)
    # Spread by the trial's number, always the same way, so that equal values stay visible.
    return choices.index(value) + 0.4 * (trial.number * 0.618 % 1 - 0.5)


def _hyperparameter_axes(
    name: str,
    rule: Mapping[str, Any],
    choices: list[Any] | None,
    trials: Sequence[Outcome],
    y: tuple[float, float],
) -> Axes:
    size: dict[str, Any] = {"width": 300, "height": 190, "left": 34}
    if choices is not None:
        axes = Axes((-0.6, len(choices) - 0.4), y, **size)
        room = max(3, 38 // len(choices))
        ticks = [(float(at), short(shown_value(c), room)) for at, c in enumerate(choices)]
    else:
        values = [float(trial.params[name]) for trial in trials]
        # Values that were given by hand may lie outside of what is searched.
        low = min([float(rule.get("low", math.inf)), *values])
        high = max([float(rule.get("high", -math.inf)), *values])
        is_log = bool(rule.get("log")) and low > 0
        axes = Axes((low, high), y, log_x=is_log, **size)
        found = log_ticks(low, high) if is_log else nice_ticks(low, high, 4)
        ticks = [(tick, f"{tick:g}") for tick in found]
    axes.frame(short(name, 36), "", ticks)
    return axes


def trial_curves(number: int, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Draw a trial's losses, validation value and learning rate by epoch; empty below two."""
    if len(rows) < 2:
        return []
    panels = []
    # Of a network with a descriptor beside it also what the network gets right alone.
    are_two = any("network_macro_top1" in row for row in rows)
    for title, names, scale in (
        ("loss: training (grey), validation (colour)", ("train_loss", "loss"), 1.0),
        (
            f"{VALUE}: network alone (grey), both (colour)" if are_two else VALUE,
            ("network_macro_top1", "macro_top1"),
            100.0,
        ),
        ("learning rate", ("learning_rate",), 1.0),
    ):
        series = [
            [(row["epoch"], scale * row[name]) for row in rows if _is_number(row.get(name))]
            for name in names
        ]
        known = [value for points in series for _, value in points]
        if not known:
            continue
        axes = Axes((1.0, float(len(rows))), (min(0.0, *known), max(known)), 420, 260, 56, top=26)
        axes.frame("epoch", title, numbers(*axes.x))
        for points, kind in zip(series[::-1], ("b", "l"), strict=False):
            axes.line(points, kind, 1.8)
        panels.append(axes.svg(f"Trial {number}: {title} by epoch"))
    return panels


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def alone(panels: Sequence[str], style: str) -> str:
    """Put panels below one another into an SVG file of their own."""
    sizes = [panel.split('viewBox="0 0 ', 1)[1].split('"', 1)[0].split() for panel in panels]
    width = max(int(w) for w, _ in sizes)
    parts, top = [], 0
    for panel, (w, h) in zip(panels, sizes, strict=True):
        place = f'<svg x="0" y="{top}" width="{w}" height="{h}" '
        parts.append(panel.replace("<svg ", place, 1))
        top += int(h) + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top}" '
        f'viewBox="0 0 {width} {top}"><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )
