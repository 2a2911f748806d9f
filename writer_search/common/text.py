"""Texts for people: one line, percent, durations, tables as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any


def one_line(text: object, limit: int = 300) -> str:
    """Squeeze any text (an error, a hostile file name) into one printable line."""
    flat = " ".join(str(text).split()).encode("utf-8", "backslashreplace").decode()
    printable = flat
    if not flat.isprintable():
        printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in flat)
    return printable if len(printable) <= limit else printable[: limit - 1] + "…"


def percent(value: float | None) -> str:
    return "none yet" if value is None else f"{100 * value:.2f}%"


def epoch_value(value: float, network: float | None) -> str:
    """Say an epoch's value, and that of a network without the descriptor beside it."""
    alone = "" if network is None else f" (network alone {percent(network)})"
    return f"val macro top-1 {percent(value)}{alone}"


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Put rows of cells into the text of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def counted(number: int, noun: str, plural: str = "") -> str:
    """Say a number of things: 1 trial, 2 trials."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """Say a duration in its two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def short_duration(seconds: float) -> str:
    """Say a duration in few characters: 45s, 12m, 1h52m, 3d4h."""
    if seconds < 60:
        return f"{seconds:.0f}s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes}m"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours < 48 else f"{hours // 24}d{hours % 24}h"


def shown_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
