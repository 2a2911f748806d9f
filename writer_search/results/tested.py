"""What was measured on the test lines, in lines for people."""

from __future__ import annotations

from typing import Any

from writer_search.common.text import percent

NOTE = "measured after the choice; never used for choosing"


METRICS = ("macro_top1", "micro_top1", "macro_top5", "page_macro_top1")


def describe(found: dict[str, Any]) -> list[str]:
    """Put what was measured into lines for people."""
    shown = {name: _with_interval(found, name) for name in METRICS}
    lines = [
        f"Test split, trial {found['trial']}, {NOTE}:",
        f"  macro top-1 {shown['macro_top1']}, pages {shown['page_macro_top1']}",
        f"  micro top-1 {shown['micro_top1']}, macro top-5 {shown['macro_top5']}",
        f"  {found['lines']} lines, {found['pages']} pages, {len(found['per_writer'])} writers; "
        "[95 % intervals by resampling pages]",
    ]
    if found["writers_with_one_page"]:
        lines.append(
            f"  {found['writers_with_one_page']} writer(s) have one test page: how they vary from "
            "page to page is in no interval, which makes them too narrow"
        )
    if found["earlier"]:
        lines.append(
            f"  the test split had been looked at {len(found['earlier'])} time(s) before, for "
            "other models or lines"
        )
    return lines


def _with_interval(found: dict[str, Any], name: str) -> str:
    if found[name] is None:
        return "- (five writers or fewer)"
    low, high = found["intervals"][name]
    return f"{percent(found[name])} [{100 * low:.1f} to {100 * high:.1f}]"
