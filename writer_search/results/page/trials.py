"""The search itself: all trials, failures by cause, charts."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from writer_search.common.files import is_there
from writer_search.common.text import duration, percent, shown_value
from writer_search.results.page.html import Column, cell, part, soft, table, text
from writer_search.results.page.snapshot import CURVES, Snapshot
from writer_search.results.page.standing import shares_of, standard_error
from writer_search.results.pictures.charts import (
    Chart,
    Outcome,
    history,
    hyperparameters,
    learning_curves,
)
from writer_search.results.rows import Row, state_of

LINKED = (CURVES, "config.json", "error.log")  # where they are there
TRY = re.compile(r"^try: +(.*)$", re.MULTILINE)


def trials_table(shown: Snapshot) -> str:
    """Make the table of trials, with links to each one's files."""
    if not shown.rows:
        return ""
    names = sorted({name for row in shown.rows for name in row.params})
    numeric = {n for n in names if all(_is_number(row.params.get(n, 0)) for row in shown.rows)}
    columns = [Column("trial", True), Column("state"), Column("value", True)]
    columns += [Column("epochs", True), Column("time", True), Column("files")]
    columns += [Column(name, name in numeric) for name in names]
    rows = [_trial(shown, row, names, numeric) for row in shown.rows]
    fixed = ", ".join(
        f"{text(name)} {text(shown_value(value))}"
        for name, value in shown.fixed(shown.rows).items()
    )
    return table("trials", "Trials", columns, rows) + (
        soft(f"Fixed, the same in all trials: {fixed}.") if fixed else ""
    )


def _trial(shown: Snapshot, row: Row, names: Sequence[str], numeric: set[str]) -> str:
    ended = row.ended is not None and row.seconds is not None
    epochs = row.attributes.get("epochs", "")
    cells = [
        cell(str(row.number), row.number, number=True),
        cell(state_of(row)),
        cell("" if row.value is None else percent(row.value), row.value, number=True),
        cell(text(epochs), epochs, number=True),
        cell(
            duration(row.seconds or 0.0) if ended else "",
            round(row.seconds or 0.0, 1) if ended else "",
            number=True,
        ),
        cell(_links(shown, row)),
    ]
    for name in names:
        value = row.params.get(name, "")
        cells.append(cell(text(shown_value(value)), value, number=name in numeric))
    mark = ' class="best"' if row is shown.best else ""
    return f"<tr{mark}>{''.join(cells)}</tr>"


def _links(shown: Snapshot, row: Row) -> str:
    """Link to a trial's files, from where the page lies."""
    directory = shown.files.directory(row)
    where = quote(os.path.relpath(os.fsencode(directory), os.fsencode(_summary(shown))))
    return " ".join(
        f'<a href="{where}/{name}">{name.partition(".")[0]}</a>'
        for name in LINKED
        if is_there(directory / name)
    )


def _summary(shown: Snapshot) -> Path:
    return shown.checkpoint_dir / "summary"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def failures(shown: Snapshot) -> str:
    """List what failed and what was interrupted by cause, the commonest first, with what to try."""
    causes: dict[tuple[str, str], list[Row]] = {}
    for row in shown.rows:
        if row.state == "FAIL":
            cause = str(row.attributes.get("failure", "no cause is recorded"))
            # The same cause at another epoch is the same cause.
            same = re.sub(r" (at|in) epoch \d+", "", cause)
            causes.setdefault((state_of(row), same), []).append(row)
    rows = []
    for (state, cause), ended in sorted(causes.items(), key=lambda item: -len(item[1])):
        rows.append(
            "<tr>"
            + cell(str(len(ended)), len(ended), number=True)
            + cell(state)
            + cell(text(cause), kind="text")
            + cell(text(_advice(shown, ended[-1])), kind="text")
            + cell(ranges([row.number for row in ended]))
            + cell(_links(shown, ended[-1]))
            + "</tr>"
        )
    if not rows:
        return ""
    columns = [Column("count", True), Column("state"), Column("cause"), Column("what to try")]
    return table("failures", "Failures", [*columns, Column("trials"), Column("the last one")], rows)


def _advice(shown: Snapshot, row: Row) -> str:
    """Give the line of a trial's error.log that says what to try."""
    try:
        log = (shown.files.directory(row) / "error.log").read_text(errors="replace")
    except OSError:
        return ""
    found = TRY.search(log)
    return found[1] if found else ""


def ranges(numbers: Sequence[int]) -> str:
    """Write numbers in rising order shortly: 0-3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def charts_of(shown: Snapshot) -> list[Chart]:
    """Draw what there are enough trials for."""
    trials = [
        Outcome(
            row.number,
            state_of(row),
            None if row.value is None else 100 * row.value,
            # A pruned trial may have trained an epoch more before it heard of it.
            [100 * v for v in shown.files.values(row)[: row.attributes.get("epochs")]],
            row.params,
        )
        for row in shown.rows
        if row.ended is not None
    ]
    if not trials:
        return []
    writers = shown.settings.get("data", {}).get("writers")
    chance = 100 / writers if isinstance(writers, int) and writers > 0 else None
    error = 100 * standard_error(shares_of(shown)[0])
    drawn = [
        history(trials, error, chance),
        learning_curves(trials, chance),
        hyperparameters(trials, shown.space),
    ]
    return [chart for chart in drawn if chart is not None]


def charts(shown: Snapshot) -> str:
    """Put the charts into the page, each with its title and how to read it."""
    figures = []
    for chart in charts_of(shown):
        boxes = "".join(
            f'<div class="chart" tabindex="0" role="region" aria-label="{text(chart.title)} '
            f'{number}">{panel}</div>'
            for number, panel in enumerate(chart.panels, 1)
        )
        inside = f'<div class="panels">{boxes}</div>' if chart.name == "hyperparameters" else boxes
        caption = f"<figcaption>{text(chart.caption)}</figcaption>"
        figures.append(part(chart.title, f"<figure>{inside}{caption}</figure>"))
    return "\n".join(figures)
