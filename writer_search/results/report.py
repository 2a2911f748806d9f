"""Writes summary/report.html: one page that shows a search and needs no network.

All that it shows comes from the search's files. Whatever stands in them (names of writers, texts of
errors) is escaped, and the page's own policy lets a browser run nothing but the script in here.
"""

from __future__ import annotations

import base64
import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from data import LineSet
from writer_search.common.errors import UserError
from writer_search.common.files import write_text
from writer_search.common.text import one_line
from writer_search.results.page.html import part, section, soft, text
from writer_search.results.page.lines import LinePictures, seen_lines, wrong_lines
from writer_search.results.page.settings import settings
from writer_search.results.page.snapshot import Snapshot, Standing, TrialFiles
from writer_search.results.page.standing import best_trial, head, how_to_go_on
from writer_search.results.page.style import CHART_STYLE, SCRIPT, STYLE
from writer_search.results.page.trials import charts, charts_of, failures, trials_table
from writer_search.results.page.writers import confusion, pages_table, writers_table
from writer_search.results.pictures.charts import alone
from writer_search.results.rows import Row

if TYPE_CHECKING:
    from optuna import Study

SOON = 1.0  # seconds between one writing and the next, at least
SIGN_OF_LIFE = 60.0  # seconds: the page is written anew so often, also when no trial ends
SHARE = 0.03  # of the search process's time, at most, is spent on the page


class ReportPage:
    """Keeps summary/report.html up to date while a search runs.

    The search process writes it itself, in tens of milliseconds: what ended trials have left is
    read once, and charts are SVG. Whatever fails is one warning: a page is not worth a search.
    """

    def __init__(self, checkpoint_dir: Path, data: LineSet | None = None) -> None:
        """data: for pictures of lines; without it the page shows none."""
        self._files, self._pictures = TrialFiles(checkpoint_dir), LinePictures(data)
        self._is_due = True
        self._next, self._last = 0.0, -math.inf
        self._failed = False

    def trial_has_ended(self) -> None:
        """Have the page written soon."""
        self._is_due = True

    def seconds_to_next(self) -> float:
        """Give how long `write_if_due` has nothing to do."""
        soonest = self._next if self._is_due else max(self._next, self._last + SIGN_OF_LIFE)
        return max(0.0, soonest - monotonic())

    def write_if_due(
        self, rows: Sequence[Row], study: Study, standing: Callable[[], Standing]
    ) -> None:
        """Write the page if something has changed, or for a sign of life; not too often."""
        if self.seconds_to_next() <= 0:
            self.write(rows, study, standing)

    def write(self, rows: Sequence[Row], study: Study, standing: Callable[[], Standing]) -> None:
        """Write the page, and the charts as files when the search runs no more."""
        started = monotonic()
        try:
            shown = Snapshot(self._files, rows, study.user_attrs, standing())  # asks the database
            write_page(shown, self._pictures)
            if not shown.standing.is_live:
                write_charts(shown)
        except UserError:  # a storage out of reach, which has been waited for
            raise
        except Exception as error:
            if not self._failed:
                cause = one_line(f"{type(error).__name__}: {error}")
                print(f"warning: writing the report: {cause}", file=sys.stderr, flush=True)
            self._failed = True
        self._last, self._is_due = monotonic(), False
        self._next = self._last + max(SOON, (self._last - started) / SHARE)


def write_page(shown: Snapshot, pictures: LinePictures) -> None:
    """Write summary/report.html, whole."""
    directory = shown.checkpoint_dir / "summary"
    directory.mkdir(exist_ok=True)
    write_text(directory / "report.html", report_html(shown, pictures))


def report_html(shown: Snapshot, pictures: LinePictures) -> str:
    """Describe a search as one self-contained page."""
    name = text(shown.checkpoint_dir.absolute().name)
    allowed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    search = [
        made(charts, shown),
        part("All trials", made(trials_table, shown)),
        part("Failures and interruptions", made(failures, shown)),
        part("How to go on", made(how_to_go_on, shown)),
    ]
    writers = made(writers_table, shown) + part("Confusion", made(confusion, shown))
    sections = [
        made(head, shown),
        made(best_trial, shown),
        section("Lines it gets wrong", made(wrong_lines, shown, pictures), "lines"),
        section("What the network sees", made(seen_lines, pictures)),
        section("Writers", writers),
        section("Pages", made(pages_table, shown)),
        section("The search", "\n".join(filter(None, search))),
        section("Settings", made(settings, shown)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        f"img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Search {name}</title>\n<style>{STYLE}{CHART_STYLE}</style>\n</head>\n"
        "<body>\n<main>\n"
        + "\n".join(part for part in sections if part)
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def made(make: Callable[..., str], *of: object) -> str:
    """Make a part of the page; a line in its place where a damaged file lets that fail."""
    try:
        return make(*of)
    except Exception as error:
        return soft(f"Cannot be shown: {text(one_line(f'{type(error).__name__}: {error}'))}")


def write_charts(shown: Snapshot) -> None:
    """Write each chart into summary/ as a file of its own; remove what is there no more."""
    drawn = {chart.name: chart for chart in charts_of(shown)}
    for name in ("history", "learning_curves", "hyperparameters"):
        path = shown.checkpoint_dir / "summary" / f"{name}.svg"
        if name in drawn:
            write_text(path, alone(drawn[name].panels, CHART_STYLE))
        else:
            path.unlink(missing_ok=True)
