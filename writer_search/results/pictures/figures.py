"""How a picture looks and is saved: style, palette, labels, axes of values, whole files.

Matplotlib is imported when the first picture is drawn, without pyplot or a display.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from writer_search.common.files import write_whole
from writer_search.common.text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACCURACY = "Validation macro top-1 (%)"

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


def matplotlib_is_there() -> bool:
    try:
        with _quiet():
            import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def try_to_draw(path: Path, draw: Callable[[], Figure]) -> str | None:
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


def empty_figure(width: float, height: float) -> Figure:
    """Make an empty figure, in inches; it belongs to no pyplot, so nothing has to be closed."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def short_name(name: object, limit: int = 24) -> str:
    """Make any name a short plain label: one line, its middle left out, `$` not mathematics."""
    text = one_line(name, 10**6)
    if len(text) > limit:
        head = limit // 2
        text = f"{text[:head]}…{text[len(text) - (limit - head - 1) :]}"
    return text.replace("$", r"\$")


def whole_numbers(axes: Axes, name: str = "Trial") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


# ------------------------------------------------------------------------------- values on an axis


def lowest_shown(values: Sequence[float]) -> float:
    """Choose the lowest value shown, so that a few poor trials do not flatten all others."""
    top = max(values)
    spread = max(top - float(np.percentile(values, 25)), 1.0)
    return max(min(values), top - 2.5 * spread)


def limit_values(axes: Axes, floor: float, top: float) -> None:
    margin = 0.06 * max(top - floor, 1.0)
    axes.set_ylim(floor - margin, top + margin)
    axes.set_ylabel(ACCURACY)


def on_axis(values: Sequence[float], floor: float, top: float) -> list[float]:
    """Move what lies below the axis onto its lower edge."""
    edge = floor - 0.03 * max(top - floor, 1.0)
    return [value if value >= floor else edge for value in values]


def mark_below(axes: Axes, values: Sequence[float], floor: float) -> None:
    below = sum(value < floor for value in values)
    if below:
        note = f"{below} below the axis, drawn at its edge"
        axes.set_title(note, loc="right", fontsize=9, color=GREY)


def label_log_axis(axes: Axes) -> None:
    """Label a logarithmic x axis at 1, 2 and 5 of each power of ten, or at powers alone."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1,)):
        ticks = [step * 10.0**power for power in powers for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 5:
            break
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
