"""Several searches side by side, from their files alone. Imports no torch."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from writer_search.common.errors import UserError
from writer_search.common.files import read_dict
from writer_search.common.text import one_line, percent, shown_value
from writer_search.results.chosen import read_confirmation
from writer_search.results.confirmed import spread
from writer_search.results.rows import Row, best_row, count_states, read_recorded, trial_dir
from writer_search.results.tested import with_interval
from writer_search.space import fixed_of


@dataclass(frozen=True)
class Compared:
    """One search, as its files have it."""

    name: str
    rows: list[Row]
    settings: dict[str, Any]
    confirmation: dict[str, Any] | None
    test: dict[str, Any]
    config: dict[str, Any]  # the best trial's config.json
    lines: str | None  # a fingerprint of the images and splits, whatever their height
    best: Row | None

    @property
    def value(self) -> float | None:
        return None if self.best is None else self.best.value

    @property
    def confirmed(self) -> float | None:
        return None if self.confirmation is None else float(self.confirmation["winner"]["mean"])

    @property
    def params(self) -> dict[str, Any]:
        return {} if self.best is None else self.best.params

    @property
    def fixed(self) -> dict[str, Any]:
        """The best trial's hyperparameters that were not drawn."""
        space = self.settings.get("space", {})
        return {} if self.best is None else dict(fixed_of(space, self.best.params))

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = self.settings.get("data", {})
        return found


def read_search(directory: Path) -> Compared:
    """Read what is to be compared of one search. Raises UserError."""
    try:
        rows, recorded = read_recorded(directory)
    except UserError as error:
        raise UserError(f"--compare: {error}") from None
    settings = recorded.get("settings", {})
    report = read_dict(directory / "summary" / "data_report.json")
    best = best_row(rows)
    return Compared(
        name=str(directory),
        rows=rows,
        settings=settings,
        confirmation=read_confirmation(directory, rows),
        test=read_dict(directory / "summary" / "test_metrics.json"),
        config={} if best is None else read_dict(trial_dir(directory, best.number) / "config.json"),
        lines=report.get("fingerprint", settings.get("data", {}).get("fingerprint")),
        best=best,
    )


def why_not_ranked(searches: Sequence[Compared]) -> list[str]:
    """Say why values cannot be compared: a line for each search that differs from the first."""
    first, *others = searches
    reasons = []
    for search in others:
        metrics = [s.settings.get("metric") for s in (first, search)]
        if metrics[0] != metrics[1]:
            reasons.append(f"{search.name} has another metric than {first.name}: {metrics[1]}")
        if search.lines != first.lines or search.lines is None:
            counts = f"{_lines(search)} of {_writers(search)} writers"
            reasons.append(
                f"{search.name} has other lines than {first.name} (fingerprint {search.lines}, "
                f"not {first.lines}; {counts}): the values cannot be compared"
            )
    return reasons


def ranks(searches: Sequence[Compared]) -> tuple[str, list[str]]:
    """Rank by the confirmed means where all have one, else by the best values; equals alike."""
    by = "best value"
    values = [search.value for search in searches]
    if all(search.confirmed is not None for search in searches):
        by, values = "confirmed mean", [search.confirmed for search in searches]
    known = [value for value in values if value is not None]
    return by, ["-" if v is None else str(1 + sum(k > v for k in known)) for v in values]


# ------------------------------------------------------------------------------------ for people


def compare_text(directories: Sequence[Path]) -> str:
    """Give one table, a column for each search. Raises UserError."""
    if len(directories) < 2:
        raise UserError("--compare: give two search directories or more")
    searches = [read_search(directory) for directory in directories]
    table = [(label, [fact(search) for search in searches]) for label, fact in FACTS.items()]
    names = sorted({name for s in searches for name in (*s.params, *s.fixed)})
    table += [(f"  {name}", [_param(search, name) for search in searches]) for name in names]
    reasons = why_not_ranked(searches)
    if not reasons:
        by, places = ranks(searches)
        table.append((f"rank by {by}", places))
    lines = _columns(table, shutil.get_terminal_size((100, 24)).columns)
    return "\n".join(lines + [f"not ranked: {one_line(reason)}" for reason in reasons])


def _columns(table: Sequence[tuple[str, list[str]]], width: int) -> list[str]:
    """Lay the table out; where it is wider than the terminal, in several blocks."""
    labels = max(len(label) for label, _ in table)
    shown = [(label, [one_line(cell) for cell in cells]) for label, cells in table]
    widths = [max(len(cells[i]) for _, cells in shown) for i in range(len(shown[0][1]))]
    blocks: list[list[int]] = [[]]
    for column in range(len(widths)):
        if blocks[-1] and labels + sum(widths[c] + 2 for c in [*blocks[-1], column]) > width:
            blocks.append([])
        blocks[-1].append(column)
    lines: list[str] = []
    for block in blocks:
        lines += [""] if lines else []
        for label, cells in shown:
            row = [label.ljust(labels), *(cells[c].ljust(widths[c]) for c in block)]
            lines.append("  ".join(row).rstrip())
    return lines


def _states(state: str) -> Callable[[Compared], str]:
    return lambda search: str(count_states(search.rows)[state])


def _writers(search: Compared) -> str:
    return str(search.data.get("writers", "-"))


def _lines(search: Compared) -> str:
    counts = search.data.get("lines", {})
    return ", ".join(f"{count} {split}" for split, count in counts.items()) or "-"


def _best(search: Compared) -> str:
    return "-" if search.best is None else f"{percent(search.value)} (trial {search.best.number})"


def _confirmed(search: Compared) -> str:
    if search.confirmation is None:
        return "-"
    winner = search.confirmation["winner"]
    return f"{spread(winner['mean'], winner['deviation'])} (trial {winner['trial']})"


def _test(search: Compared) -> str:
    try:
        shown = with_interval(search.test["macro_top1"], search.test["intervals"]["macro_top1"])
        return f"{shown} (trial {search.test['trial']})"
    except (KeyError, TypeError, ValueError):
        return "-"


def _hours(search: Compared) -> str:
    return f"{sum(row.seconds or 0.0 for row in search.rows if row.ended) / 3600:.2f}"


def _device(search: Compared) -> str:
    names = search.config.get("device_names")
    if names:
        return ", ".join(sorted(set(map(str, names))))
    return str(search.config.get("device", "-"))


def _param(search: Compared, name: str) -> str:
    if name in search.params:
        return shown_value(search.params[name])
    return f"{shown_value(search.fixed[name])} (fixed)" if name in search.fixed else "-"


def _setting(name: str) -> Callable[[Compared], str]:
    return lambda search: str(search.settings.get(name, "-"))


FACTS: dict[str, Callable[[Compared], str]] = {
    "search": lambda search: search.name,
    "writers": _writers,
    "lines": _lines,
    "line height": lambda search: str(search.settings.get("space", {}).get("line_height", "-")),
    "trials complete": _states("complete"),
    "pruned": _states("pruned"),
    "failed": _states("failed"),
    "interrupted": _states("interrupted"),
    "best value": _best,
    "confirmed mean": _confirmed,
    "test macro top-1": _test,
    "epochs at most": _setting("epochs"),
    "weights": _setting("weights"),
    "hours of trials": _hours,
    "device": _device,
    "best trial's": lambda search: "",
}
