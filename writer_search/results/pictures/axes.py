"""Axes, ticks and marks of a chart, as SVG: drawn in milliseconds, sharp at any size.

Colours are classes of the page's style, so that a chart follows it into the dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from writer_search.common.text import one_line

Point = tuple[float, float]


def shown(value: object, limit: int = 200) -> str:
    return html.escape(one_line(value, limit))


def short(value: object, limit: int = 18) -> str:
    """Make any name a short label, its middle left out."""
    text = one_line(value, 10**6)
    if len(text) > limit:
        head = limit // 2
        text = f"{text[:head]}…{text[len(text) - (limit - head - 1) :]}"
    return text


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Choose round numbers between two ends: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(s * power for s in (1, 2, 5, 10, 20) if (high - low) / (s * power) <= most)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Choose 1, 2 and 5 of each power of ten, or powers alone where those are too many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**power for power in powers for step in steps]
        ticks = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(ticks) <= 4:
            break
    return ticks or [low, high]


@dataclass
class Axes:
    """A rectangle that values are placed in. x, y: the values at its ends."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: int = 640
    height: int = 300
    left: int = 52
    bottom: int = 40
    top: int = 12
    log_x: bool = False
    marks: list[str] = field(default_factory=list)

    def at_x(self, value: float) -> float:
        low, high = self.x
        if self.log_x:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low) if high > low else 0.5
        return self.left + share * (self.width - self.left - 12)

    def at_y(self, value: float) -> float:
        """Place a value; one that lies outside is put at the edge."""
        low, high = self.y
        share = (min(max(value, low), high) - low) / (high - low) if high > low else 0.5
        return self.height - self.bottom - share * (self.height - self.bottom - self.top)

    def line(self, points: Sequence[Point], kind: str, width: float, title: str = "") -> None:
        """Draw a line. kind: its class."""
        if points:
            path = " ".join(f"{self.at_x(x):.1f},{self.at_y(y):.1f}" for x, y in points)
            self._add(f'polyline points="{path}" class="{kind}" stroke-width="{width}"', title)

    def dot(self, x: float, y: float, kind: str, radius: float, title: str = "") -> None:
        at = f'cx="{self.at_x(x):.1f}" cy="{self.at_y(y):.1f}" r="{radius}"'
        self._add(f'circle {at} class="{kind}"', title)

    def cross(self, x: float, y: float, size: float, title: str = "") -> None:
        a, b = self.at_x(x), self.at_y(y)
        path = f"M{a - size:.1f} {b - size:.1f}l{2 * size} {2 * size}m0 {-2 * size}l{-2 * size} "
        self._add(f'path d="{path}{2 * size}" class="x" stroke-width="1.4"', title)

    def tick(self, x: float, title: str = "") -> None:
        """Mark a place along the upper edge."""
        a = self.at_x(x)
        self._add(f'path d="M{a:.1f} {self.top}v8" class="x" stroke-width="1.6"', title)

    def across(self, y: float, kind: str = "n") -> None:
        """Draw a line across, if it is within the ends."""
        if self.y[0] <= y <= self.y[1]:
            self.line([(self.x[0], y), (self.x[1], y)], kind, 1.2)

    def band(self, low: float, high: float) -> None:
        """Shade what lies between two values."""
        top, bottom = self.at_y(high), self.at_y(low)
        width = self.width - self.left - 12
        self._add(
            f'rect x="{self.left}" y="{top:.1f}" width="{width}" height="{bottom - top:.1f}" '
            'class="s"'
        )

    def write(self, x: float, y: float, text: str, anchor: str = "start", kind: str = "t") -> None:
        """Write text at a place in the chart's own units."""
        self.marks.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{shown(text)}'
            "</text>"
        )

    def _add(self, element: str, title: str = "") -> None:
        name = element.partition(" ")[0]
        inside = f"<title>{shown(title)}</title>" if title else ""
        self.marks.append(f"<{element}>{inside}</{name}>" if inside else f"<{element}/>")

    def frame(self, x_name: str, y_name: str, x_ticks: Sequence[tuple[float, str]]) -> None:
        """Draw grid, labels and names, beneath what comes later."""
        for value in nice_ticks(*self.y, most=5):
            self.line([(self.x[0], value), (self.x[1], value)], "g", 1)
            self.write(self.left - 6, self.at_y(value) + 4, f"{value:g}", "end")
        floor = self.height - self.bottom
        for value, label in x_ticks:
            x = min(self.at_x(value), self.width - 4 - 3.2 * len(label))  # within the picture
            self.write(x, floor + 16, label, "middle")
        self.write((self.left + self.width) / 2, self.height - 6, x_name, "middle", "")
        if y_name:
            self.write(4, 12, y_name, "start", "")

    def svg(self, description: str) -> str:
        return (
            f'<svg class="c" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{shown(description, 1000)}" xmlns="http://www.w3.org/2000/svg">'
            f"{''.join(self.marks)}</svg>"
        )


def numbers(low: float, high: float, most: int = 8) -> list[tuple[float, str]]:
    """Give whole numbers as ticks, with their labels."""
    return [(tick, f"{tick:g}") for tick in nice_ticks(low, high, most) if tick == int(tick)]
