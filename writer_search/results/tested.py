"""What was measured on the test lines, in lines for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from writer_search.common.text import counted, percent
from writer_search.results.rows import trial_dir

NOTE = "measured after the choice; never used for choosing"


METRICS = ("macro_top1", "micro_top1", "macro_top5", "page_macro_top1")


def describe(found: dict[str, Any]) -> list[str]:
    """Put what was measured into lines for people."""
    shown = {name: _with_interval(found, name) for name in METRICS}
    unit = found.get("interval_unit", "pages")
    pages = "pages not known" if found["pages"] is None else f"{found['pages']} pages"
    where = f"trial {found['trial']}"
    if found["directory"] != trial_dir(Path(), found["trial"]).name:  # of a confirmation, or shared
        where += f" ({found['directory']})"
    has_intervals = any("[" in value for value in shown.values())
    lines = [
        f"Test split, {where}, {NOTE}:",
        f"  macro top-1 {shown['macro_top1']}"
        + (f", pages {shown['page_macro_top1']}" if found["pages"] is not None else ""),
        f"  micro top-1 {shown['micro_top1']}, macro top-5 {shown['macro_top5']}",
        f"  {found['lines']} lines, {pages}, {len(found['per_writer'])} writers"
        + (f"; [95 % intervals by resampling {unit}]" if has_intervals else ""),
    ]
    without = len(found.get("writers_without_test_lines", ()))
    if without:
        lines.append(
            f"  {without} of {counted(without + len(found['per_writer']), 'writer')} "
            f"{'has' if without == 1 else 'have'} no test lines, not included in the means"
        )
    if has_intervals and unit == "lines":
        if not found["pages"]:
            cause = "pages are not known"
        elif found["writers_with_one_page"] == len(found["per_writer"]):
            cause = "each writer has one test page"
        else:
            cause = "no writer's test pages differ in accuracy"
        lines.append(
            f"  {cause}: lines were resampled; the intervals leave out how writers vary from page "
            "to page, and are too narrow"
        )
    elif has_intervals and found["writers_with_one_page"]:
        lines.append(
            f"  {counted(found['writers_with_one_page'], 'writer has', 'writers have')} one test "
            "page: lines were resampled there; the intervals leave out how such writers vary from "
            "page to page, and are too narrow"
        )
    if found.get("lines_not_counted"):
        lines.append(
            f"  {counted(found['lines_not_counted'], 'test line')} of writers without training "
            "lines could not be counted"
        )
    if found["earlier"]:
        lines.append(
            f"  the test split had been looked at {counted(len(found['earlier']), 'time')} before, "
            "for other models or lines"
        )
    return lines


def _with_interval(found: dict[str, Any], name: str) -> str:
    if found[name] is None:
        return "- (five writers or fewer)"
    return with_interval(found[name], found["intervals"][name])


def with_interval(value: float, interval: Sequence[float] | None) -> str:
    """Show a share with its interval, where there is one and it has a width."""
    if interval is None or interval[0] == interval[1]:
        return percent(value)
    return f"{percent(value)} [{100 * interval[0]:.1f} to {100 * interval[1]:.1f}]"
